# SPDX-License-Identifier: LGPL-2.1-or-later
"""unittest, with a line of TAP for each test: SCRIPT.TEST."""
import os
import sys
import unittest


class TapResult(unittest.TestResult):
    def __init__(self, script):
        super().__init__()
        self.script = script
        self.prefix = self.suffix = ''

    def startTest(self, test):
        super().startTest(test)
        self.prefix = self.suffix = ''

    def stopTest(self, test):
        name = test.id().split('.')[-1].removeprefix('test_')
        print(f'{self.prefix}ok {self.script}.{name}{self.suffix}', flush=True)
        super().stopTest(test)

    def addSkip(self, test, reason):
        self.suffix = f' # SKIP {reason}'

    def addFailure(self, test, err):
        """Of the test, or of what cleans up after it."""
        print(self._exc_info_to_string(err, test))
        self.prefix = 'not '

    addError = addFailure


def main():
    script = os.path.basename(sys.argv[0]).removesuffix('.py')
    suite = unittest.defaultTestLoader.loadTestsFromModule(sys.modules['__main__'])
    result = TapResult(script)
    suite.run(result)
    sys.exit(0 if result.testsRun > 0 else 1)
