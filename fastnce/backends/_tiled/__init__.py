"""What the two backends that walk tiles of logits in one order share: `torch` with torch's operations, `cpu` with those of its library.

    operands.py   scaled rows, and how a call is computed
    sums.py       what forward collects for every row, and the statistics that follow
    gradients.py  what backward starts from, the coefficients of the weights, and the gradients that follow
    moment.py     the derivative by scale
    gemm.py       products of matrices and of rows

Logits are kept in base 2 and without the bias: t_ij = <x_i, y_j> with x = root * q_hat, y = root * k_hat, root^2 = scale * log2(e). One
scaled copy of each input then serves the logits and both gradient products, and exp2 is four times as fast as exp. Nothing here is larger
than an input.
"""
