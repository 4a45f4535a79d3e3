"""Values that every stage shares: the graph, the plan, the budget, the result. No torch, onnxruntime or optuna here."""
