/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-mount.h"
#include "ctl.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

/* "\040" for a space, as in /proc/self/mountinfo. */
static void unescape(char *s)
{
	char *to = s;

	for (; *s; s++, to++) {
		unsigned c;

		if (*s == '\\' && sscanf(s + 1, "%3o", &c) == 1) {
			*to = (char)c;
			s += 3;
		} else {
			*to = *s;
		}
	}
	*to = 0;
}

/* "36 35 98:0 /root /point options … - type source options" */
static bool read_line(char *line, struct mount *m)
{
	unsigned long long id;
	char *separator = strstr(line, " - ");

	if (!separator || sscanf(line, "%llu %*u %*s %*s %4095s", &id, m->point) != 2 ||
		id != m->id)
		return false;
	if (sscanf(separator, " - %63s %4095s", m->type, m->source) != 2)
		return false;
	unescape(m->point);
	unescape(m->source);
	return true;
}

int mount_of(int fd, struct mount *ret)
{
	_cleanup_(close_filep) FILE *f = NULL;
	_cleanup_(freep) char *line = NULL;
	size_t size = 0;
	struct statx stx;

	if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_MNT_ID, &stx) < 0)
		return -errno;
	ret->id = stx.stx_mnt_id;
	ret->device = makedev(stx.stx_dev_major, stx.stx_dev_minor);
	ret->is_root = stx.stx_attributes & STATX_ATTR_MOUNT_ROOT;
	f = fopen("/proc/self/mountinfo", "re");
	if (!f)
		return -errno;
	while (getline(&line, &size, f) > 0)
		if (read_line(line, ret))
			return 0;
	return -ENOENT;
}
