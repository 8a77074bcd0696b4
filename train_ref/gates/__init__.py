"""Gates that a fused contrastive loss has to pass, from its formula to what is trained with it.

    formula     float64, against the stored results of nine implementations of seven other projects
    operator    one call at a time against float64: shapes, temperatures, lengths, upstream gradients of every kind
    replay      loss and gradients at the parameters of a real training, against the dense float32 reference
    free_run    trainings of their own, beside the drift of the reference from itself in another order
    outcome     equivalence of the accuracies that are reached: of the recipe, not of the arithmetic

A gate takes a Subject and gives a Verdict of Checks, each a measured number and its limit. Sizes are arguments, whose
defaults are the full ones. docs/validation.md says what each gate proves and which injected faults it catches.
"""
