"""The backends `torch` and `cpu` beside their tiles. Both visit the same tiles in the same order: by torch's operations, by the library.

    operands.py   scaled rows, and how a call is computed
    sums.py       forward: the sums that tiles add to, and the statistics that follow from them
    gradients.py  backward: the coefficients of the weights, the sums that tiles add to, and the gradients that follow from them
    moment.py     the derivative by scale
    gemm.py       products of matrices and of rows

Logits are in base 2: t_ij = <x_i, y_j> with x = root * q_hat, y = root * k_hat, root^2 = scale * log2(e). So one
scaled copy of each input serves the logits and both products of the gradient, and exp2 is four times as fast as exp. The bias is added for
term and weight. Ranks, means of positives and the derivative by scale come from logits without it. No tensor here is larger than an input,
or than three numbers a row.
"""
