"""Training objectives: next-token prediction, flow matching, routing, their random numbers and the loss of a step."""
