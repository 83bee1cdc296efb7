"Recommenders: popularity, implicit models, content, hybrid; metrics, comparison and bundles. Loaded when first used."
import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={
    "base": ["Recommender", "RecommenderBundle", "load"],
    "popularity": ["Popularity", "Random"],
    "als": ["ALS"],
    "als_features": ["FeatureALS"],
    "gradient_factors": ["BPR", "LogisticMF"],
    "item_item": ["ItemItem"],
    "markov": ["Markov"],
    "sasrec": ["SASRec"],
    "linear": ["EASE", "EDLAE"],
    "graph_filters": ["GFCF", "PolynomialFilter"],
    "blend": ["Blend", "best_weights"],
    "rerank": ["TwoStage"],
    "content": ["Content"],
    "hybrid": ["Hybrid"],
    "features": ["item_features"],
    "evaluation": ["Comparison", "category_shares", "compare", "evaluate", "paired_tests", "tune"],
    "protocols": ["Protocol", "ProtocolResult", "compare_protocol", "official", "protocol", "run_protocol"],
    "health": ["Health", "recommender_health", "retraining_gain", "training_end"],
    "off_policy": ["item_mean_rewards", "off_policy_metrics", "shown_policy"],
    "serving": ["epsilon_greedy", "freshness", "plackett_luce", "rerank_candidates", "thompson"],
    "ann": ["ItemIndex"],
    "models": ["check_model", "make_model", "tune_by", "tune_model"],
    "served": ["by_activity", "by_popularity", "is_it_worth_it", "newcomers", "plot_by_k", "plot_served", "quality_by_k"],
    "plots": ["plot_comparison", "plot_popularity"],
})
