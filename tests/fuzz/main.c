/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "fuzz.h"

#include <err.h>
#include <stdio.h>
#include <stdlib.h>

/* Runs the files named, once each, where there is no fuzzer. */
int main(int argc, char **argv)
{
	static uint8_t data[1024 * 1024];

	for (int i = 1; i < argc; i++) {
		FILE *f = fopen(argv[i], "re");
		uint8_t *exact;
		size_t n;

		if (!f)
			err(EXIT_FAILURE, "Cannot open %s", argv[i]);
		n = fread(data, 1, sizeof(data), f);
		if (ferror(f))
			err(EXIT_FAILURE, "Cannot read %s", argv[i]);
		fclose(f);
		/* Without spare bytes behind it, so that a sanitizer sees a read beyond. */
		exact = malloc(n + !n);
		if (!exact)
			err(EXIT_FAILURE, "Cannot allocate %zu bytes", n);
		for (size_t j = 0; j < n; j++)
			exact[j] = data[j];
		LLVMFuzzerTestOneInput(exact, n);
		free(exact);
	}
	return EXIT_SUCCESS;
}
