"""From variants and a model to a pure function of one flat dict.

Once: `targets` finds the layers, `leaves` draws their parameters, `adapt` puts an `adapter`
together; `refused` and `experts` tell what cannot be adapted, `collect` looks at data.

In a call, the adapter turns a `batch` into arguments, builds a `view` of the model (with the help
of `rebind`; `survey` helps a trace) and runs it. `layer` is where a variant is applied, `examples`
runs it for each example. Afterwards `reach` tells which layers did not run, and `untouched`
whether the base is what it was.
"""
