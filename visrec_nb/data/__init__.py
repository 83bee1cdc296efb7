"Catalogs, interactions, quality checks, splits, public data sets and sample data. Loaded when first used."
import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={
    "catalog": ["catalog_fingerprint", "catalog_from_folder", "class_indicators", "class_labels", "class_numbers", "count_by_class",
                "read_catalog", "scan_catalog", "validate_catalog", "with_hashes", "write_catalog"],
    "cleaning": ["Cleaned", "Cleaning", "apply_cleaning", "cleaning_candidates", "read_decisions"],
    "duplicates": ["near_duplicates", "small_pictures"],
    "drift": ["check_drift", "drift_findings", "most_typical", "plot_newness"],
    "interactions": ["check_interactions", "hold_out_users", "k_core", "merge_duplicates", "plot_popularity", "popularity_curve",
                     "popularity_facts", "read_interactions", "split_interactions", "with_recency", "without_bots"],
    "labels": ["label_findings", "label_issues", "outliers", "plot_suspects", "suspect_facts"],
    "lookalikes": ["alike_labels", "label_likeness", "picture_map", "plot_likeness", "plot_map", "typical_items"],
    "neighbours": ["Neighbours", "near_pairs"],
    "overview": ["file_facts", "log_facts", "overview_facts", "plot_activity", "plot_files"],
    "prepare": ["Prepared", "class_weights", "extract_frames", "prepare_again", "prepare_images", "sample_weights"],
    "public": ["fetch", "read_hmdb51", "read_imagenette", "read_kinetics", "read_movielens", "read_oxford_pets", "read_ucf101", "unpack"],
    "quality": ["Check", "check_catalog", "duplicate_pairs", "plot_classes", "plot_pairs"],
    "remote": ["local_file"],
    "rules": ["CatalogFacts", "as_catalog", "media_kind"],
    "samples": ["MovieLens", "camera_moves", "clothing", "movielens", "sample_data"],
    "segments": ["Segmented", "segment_videos"],
    "splits": ["fold_catalog", "group_alike", "group_from_names", "leaks",
               "refuse_leaks", "repair_leaks", "split_catalog", "use_fold", "with_test_part"],
})
