"Safe image and video decoding, coarse motion, rendered camera moves. Loaded when first used."
import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={
    "image": ["decode_image", "load_image"],
    "video": ["Clip", "Facts", "Pairs", "probe", "read_clip", "read_pairs"],
    "motion": ["grid_flow"],
    "render": ["MOVES", "camera_path", "render_frames", "render_move", "write_video"],
})
