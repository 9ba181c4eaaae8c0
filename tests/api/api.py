#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The library as programs see it, without running it: its header for every compiler and standard, the
symbols that it exports ($LIBPINBROKER), and that these stay as they are.
"""

import os
import re
import shutil
import subprocess
import tempfile
import unittest

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), '../..')
HEADER = os.path.join(SOURCE, 'client/pinbroker.h')
LIBRARY = os.environ['LIBPINBROKER']
COMPILERS = {
    'c': (('gcc', 'clang'), ('c11', 'c17', 'c2x', 'gnu17')),
    'c++': (('g++', 'clang++'), ('c++11', 'c++20')),
}
WARNINGS = ['-Wall', '-Wextra', '-Wpedantic', '-Wshadow', '-Werror']


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix='pinbroker-test-')
        self.addCleanup(shutil.rmtree, self.dir)

    def run_command(self, *argv):
        """What it prints."""
        result = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.dir,
                                encoding='utf-8', timeout=120, check=False)
        self.assertEqual(result.returncode, 0, f'{" ".join(argv)}: {result.stdout}')
        return result.stdout


class Api(Case):
    def compile(self, language, *arguments):
        """With each compiler and standard; how many there were."""
        compilers, standards = COMPILERS[language]
        found = [c for c in compilers if shutil.which(c)]
        for compiler in found:
            for standard in standards:
                self.run_command(compiler, '-x', language, '-std=' + standard, *WARNINGS,
                                 *arguments)
        return len(found)

    def test_header(self):
        """Needs nothing before it, and can come twice."""
        for language in COMPILERS:
            source = os.path.join(self.dir, 'source')
            with open(source, 'w', encoding='utf-8') as f:
                f.write(f'#include "{HEADER}"\n#include "{HEADER}"\n'
                        'pinbroker *f(void);\npinbroker *f(void) { return pinbroker_ref(0); }\n')
            self.assertGreater(self.compile(language, '-fsyntax-only', source), 0)
            # C++ calls it by its C name
            self.compile(language, '-c', '-o', 'object', source)
            self.assertIn('U pinbroker_ref\n', self.run_command('nm', 'object'))

    def declared(self):
        """By the compiler's own account."""
        self.run_command('gcc', '-x', 'c', '-fsyntax-only', '-aux-info', 'declarations', HEADER)
        with open(os.path.join(self.dir, 'declarations'), encoding='utf-8') as f:
            lines = re.findall(r'^/\* (\S+):\d+:\w+ \*/ extern .*?(\w+) \(', f.read(), re.M)
        return {name for path, name in lines if os.path.samefile(path, HEADER)}

    @staticmethod
    def listed():
        """In the version script: name@@NODE."""
        with open(os.path.join(SOURCE, 'client/libpinbroker.sym'), encoding='utf-8') as f:
            nodes = re.findall(r'^(\w+) \{(.*?)^\}', f.read(), re.M | re.S)
        names = [f'{name}@@{node}' for node, text in nodes
                 for name in re.findall(r'^\t(\w+);$', text.split('local:')[0], re.M)]
        return nodes, names

    def test_symbols(self):
        """What the header declares is what the version script lists and the library exports."""
        nodes, listed = self.listed()
        self.assertEqual(len(listed), len(set(listed)))
        for _, text in nodes:
            names = re.findall(r'^\t(\w+);$', text, re.M)
            self.assertEqual(names, sorted(names))
        exported = {line.split()[-1] for line in self.run_command(
            'nm', '-D', '--defined-only', '--with-symbol-versions', LIBRARY).splitlines()}
        self.assertEqual(exported - {node for node, _ in nodes}, set(listed))
        self.assertEqual(self.declared(), {name.split('@')[0] for name in listed})


class Abi(Case):
    def test_unchanged(self):
        """tools/abi-dump says how to renew what it is compared with."""
        dump = self.run_command(os.path.join(SOURCE, 'tools/abi-dump'), LIBRARY)
        with open(os.path.join(self.dir, 'now.abi'), 'w', encoding='utf-8') as f:
            f.write(dump)
        self.run_command('abidiff', os.path.join(SOURCE, 'tests/api/libpinbroker.abi'), 'now.abi')


if __name__ == '__main__':
    unittest.main(verbosity=2)
