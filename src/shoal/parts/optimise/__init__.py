"""Optimisers on flat parameters: pure steps from (params, grad, state) to (params, state)."""
