"Recommenders: popularity, implicit models, content, hybrid; metrics, comparison and bundles. Loaded when first used."
import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={
    "base": ["Recommender", "RecommenderBundle", "load"],
    "popularity": ["Popularity", "Random"],
    "als": ["ALS"],
    "item_item": ["ItemItem"],
    "content": ["Content"],
    "hybrid": ["Hybrid"],
    "features": ["item_features"],
    "evaluation": ["Comparison", "compare", "evaluate", "tune"],
    "plots": ["plot_comparison", "plot_popularity"],
})
