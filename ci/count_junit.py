"""count_junit.py FILE: prints "PASSED FAILED" of a JUnit report of pytest or ctest."""

import sys
import xml.etree.ElementTree as ET

passed = failed = 0
for case in ET.parse(sys.argv[1]).iter("testcase"):
    if case.find("failure") is not None or case.find("error") is not None:
        failed += 1
    elif case.find("skipped") is None and case.get("status") not in ("notrun", "disabled"):
        passed += 1
print(passed, failed)
