"""bluefog and TensorFlow in one process, whichever is imported first.

TensorFlow shows its own gRPC and protobuf to the whole process; a library that binds to them
crashes. Each case is a job of two ranks, so that control plane and data path both run beside it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorflow")

COMMAND = Path(sys.executable).parent / "bluefog"

USE_BLUEFOG = """
import numpy as np
import bluefog as bf
bf.init()
assert bf.neighbor_allreduce(np.full(3, bf.rank(), np.float32), name="a").tolist() == [0.5] * 3
"""
USE_TENSORFLOW = """
import tensorflow as tf
assert float(tf.reduce_sum(tf.linalg.matmul(tf.eye(3), tf.ones((3, 3))))) == 9
"""
AND_TOGETHER = """
mean = bf.allreduce(tf.constant([1.0, float(bf.rank())]).numpy(), name="b")
assert tf.constant(mean).numpy().tolist() == [1.0, 0.5]
bf.shutdown()
print("rank done", flush=True)
"""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(USE_TENSORFLOW + USE_BLUEFOG + AND_TOGETHER, id="TensorFlow first"),
        pytest.param(USE_BLUEFOG + USE_TENSORFLOW + AND_TOGETHER, id="bluefog first"),
        pytest.param(
            "import tensorflow as tf\nimport bluefog as bf\n" + USE_BLUEFOG + AND_TOGETHER,
            id="TensorFlow imported, not used, first",
        ),
    ],
)
def test_both_work(program):
    result = subprocess.run(
        [COMMAND, "run", "-np", "2", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("rank done") == 2
