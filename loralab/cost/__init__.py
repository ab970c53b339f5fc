"""What a step will cost, from shapes alone: the products, the memory, the parameters. No tensor is ever made, and neither PyTorch nor a
checkpoint is needed.

    recipe ── shapes of the family ── the forward pass on shapes ── its backward pass ── the optimizer
                                          │ every product is counted, and every tensor while it is there
"""
