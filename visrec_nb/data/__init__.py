"Catalogs, interactions, quality checks, splits, public data sets and sample data. Loaded when first used."
import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={
    "catalog": ["as_catalog", "catalog_fingerprint", "catalog_from_folder", "class_labels", "count_by_class", "media_kind",
                "read_catalog", "with_hashes", "write_catalog"],
    "interactions": ["check_interactions", "merge_duplicates", "read_interactions", "split_interactions"],
    "public": ["fetch", "read_hmdb51", "read_imagenette", "read_kinetics", "read_movielens", "read_oxford_pets", "read_ucf101", "unpack"],
    "quality": ["Check", "check_catalog", "duplicate_pairs", "plot_classes", "plot_pairs"],
    "samples": ["MovieLens", "camera_moves", "clothing", "movielens", "sample_data"],
    "splits": ["refuse_leaks", "split_catalog"],
})
