"""optimize(): forwards without a graph, judged by their instructions, of Python 3.10 to 3.14."""

import pytest
from support.optimize import Chain, branches

import advdl_ops

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("x = x.view(x.shape)", "uses view"),
        ("x = x.flatten(1).unflatten(1, x.shape[1:])", "uses flatten"),
        ("x = torch.reshape(x, x.shape)", "uses reshape"),
        ("x = F.dropout(x, 0.0)", "uses dropout"),
        ("x.add_(1)", "uses add_"),
        ("x = F.relu(x, inplace=True)", "it may write what it is given"),
        ("torch.mul(x, 2, out=x)", "it may write what it is given"),
        ("x += 1", "it may write what it is given"),
        ("x[0] = 1", "it does a STORE_SUBSCR"),
        ("self.y = 1", "it does a STORE_ATTR"),
        ("self.helps(1)", "it may call its own helps"),
        ("self.child.run(x)", "uses child"),
        ("x.to(memory_format=torch.channels_last)", "uses channels_last"),
        ("x = users(x)", "it calls users"),
        ("same(x, x)", "it calls same"),
        ("print()", "it calls print"),
        ("y = [v for v in x]", "it "),
        ("import math", "it does a IMPORT_NAME"),
    ],
)
def test_code_without_a_graph_that_forbids_channels_last(source, why):
    fast = advdl_ops.optimize(Chain(branches(source)).eval())
    assert f"between: its forward has no graph, and {why}" in str(advdl_ops.explain(fast)).replace(
        "it uses", "uses"
    )
