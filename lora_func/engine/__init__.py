"""From variants and a model to a pure function of one flat dict.

In the order of a call: `targets` finds the layers, `leaves` draws their parameters, `adapt` puts
an `adapter` together. A call of the adapter turns a `batch` into arguments, builds a `view` of the
model (with the help of `rebind`), and runs it; `layer` is where a variant is applied.
"""
