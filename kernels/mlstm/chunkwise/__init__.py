"""The mLSTM in Triton: quadratic inside chunks, recurrent between them.

Source of the form: xLSTM-7B (arXiv 2503.13427), section 2; TFLA (arXiv 2503.14376), section 2. Here everything that
depends on the gates alone is computed first (gates.py), then the recurrence between chunks (states.py), the weights
inside chunks (scores.py), and the read-out (read_out.py); backward.py has the gradients. launch.py and
launch_backward.py run them in order, op.py makes operators of them, and cell.py calls those. tiles.py, alone of these,
does without Triton.
"""
