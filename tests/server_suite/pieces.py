"""Pieces of a SentencePiece vocabulary, in which texts of upstream's server tests have as many tokens as there.

They were searched for: random pieces were changed until none of these differed, the counts in test_completion.py,
test_chat_completion.py (with ChatML, and how much of one prompt another can reuse), test_ctx_shift.py and
test_slot_save.py, and a prompt of test_metrics.py fitted into its context. Pieces without which all that holds
were then left out. Those before others are merged first.
"""

PIECES = """
ips ▁a it be ▁lif en ▁how ▁ch im belie fug ch ipsu ▁ju dip lor te bori Ge st ▁n ate ▁el fr ec el ▁l ook Bo at
yo ▁from ru pt ▁q ▁pr re jok ap ul ▁book ▁b eni ry enia et jo ni ▁th tet ip anin rure ▁as ▁of lo ▁j ▁o ▁are
▁tru ▁p bel atio beli oo fugi di si ma ci io bore bo ar ari ow mod ▁fu from late ▁t ▁i fu rem ▁d ariat ri star
believ al om mo ps ite ▁elit cidi Fr ot how ur ▁w ox nin ▁al bon if ▁jum ▁c ▁H
""".split()
