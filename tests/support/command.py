"""What tests of the command share: a text, and what a failed command must look like."""

TEXT = "the quick brown fox jumps over the lazy dog. " * 60


def fails(result, status, message):
    code, out, err = result
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == status, err
    assert out == ""
    assert "Traceback" not in err
    assert len(errors) == 1
    assert message in errors[0]
