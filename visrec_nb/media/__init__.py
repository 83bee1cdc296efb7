"Safe image and video decoding, coarse motion, rendered camera moves. Loaded when first used."
import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={
    "image": ["ImageFacts", "decode_image", "image_facts", "load_image", "read_bytes"],
    "video": ["Clip", "Facts", "Pairs", "probe", "read_clip", "read_pairs"],
    "isolated": ["IsolatedDecoder"],
    "motion": ["grid_flow"],
    "render": ["MOVES", "camera_path", "render_frames", "render_move", "write_video"],
})
