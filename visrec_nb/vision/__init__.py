"Image and video classification: backbones, embeddings, learners, evaluation, bundles. Loaded when first used."
import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={
    "active": ["label_next", "uncertainty"],
    "backbones": ["Backbone", "backbone", "onnx_backbone", "torch_backbone"],
    "encoder": ["Encoder", "FunctionEncoder", "open_encoder"],
    "torch_encoder": ["TorchEncoder"],
    "store": ["EmbeddingStore"],
    "explanation": ["agreement", "grad_cam", "nearest_examples", "occlusion", "overlay", "plot_explanations", "plot_neighbours",
                    "top_losses"],
    "export": ["check_onnx", "export_encoder", "quantize_encoder"],
    "features": ["catalog_vectors", "clip_preprocessing", "embed", "embed_all", "image_preprocessing", "stream_features"],
    "search": ["Gallery", "fill_gallery"],
    "loaders": ["image_loaders"],
    "training": ["fit_network"],
    "learners": ["VisionLearner", "image_learner", "video_learner"],
    "evaluation": ["classification_metrics", "confused_pairs", "multi_label_metrics", "worst_mistakes"],
    "calibration": ["choose_thresholds", "conformal_sets", "conformal_state", "fit_temperature", "reject", "threshold_for"],
    "comparison": ["compare_classifiers", "disagreements", "items_needed", "plot_comparison"],
    "slices": ["picture_facts", "plot_slices", "slice_table"],
    "robustness": ["corrupt", "plot_corruptions", "plot_robustness", "robustness_summary", "robustness_table", "try_corruptions"],
    "predictor": ["ClassifierBundle"],
})
