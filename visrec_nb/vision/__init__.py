"Image and video classification: backbones, embeddings, learners, evaluation, bundles. Loaded when first used."
import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={
    "backbones": ["Backbone", "backbone", "onnx_backbone", "torch_backbone"],
    "encoder": ["Encoder", "FunctionEncoder", "open_encoder"],
    "torch_encoder": ["TorchEncoder"],
    "store": ["EmbeddingStore"],
    "features": ["catalog_vectors", "clip_preprocessing", "embed", "image_preprocessing"],
    "search": ["Gallery", "fill_gallery"],
    "learners": ["VisionLearner", "image_learner", "video_learner"],
    "evaluation": ["classification_metrics", "worst_mistakes"],
    "predictor": ["ClassifierBundle"],
})
