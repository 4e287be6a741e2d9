"""Base classifiers: names, blueprints, loading, and access."""
