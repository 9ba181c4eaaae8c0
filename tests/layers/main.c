/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* All of a layer is in it, and those below: it links if they are all that the layer needs. */
int main(void)
{
	return 0;
}
