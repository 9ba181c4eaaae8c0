/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-mount.h"
#include "ctl.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

void unescape_word(char *s)
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
	unsigned major_number, minor_number;
	char *separator = strstr(line, " - ");

	if (!separator ||
		sscanf(line, "%llu %*u %u:%u %*s %4095s", &id, &major_number, &minor_number,
			m->point) != 4 ||
		id != m->id)
		return false;
	m->file_system = makedev(major_number, minor_number);
	if (sscanf(separator, " - %63s %4095s", m->type, m->source) != 2)
		return false;
	unescape_word(m->point);
	unescape_word(m->source);
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

int mount_find_others(const struct mount *m, uint64_t **ret, size_t *ret_n)
{
	_cleanup_(close_filep) FILE *f = fopen("/proc/self/mountinfo", "re");
	_cleanup_(freep) char *line = NULL;
	uint64_t *others = NULL;
	size_t size = 0, n = 0;

	if (!f)
		return -errno;
	while (getline(&line, &size, f) > 0) {
		unsigned major_number, minor_number;
		unsigned long long id;

		if (sscanf(line, "%llu %*u %u:%u", &id, &major_number, &minor_number) != 3 ||
			id == m->id || makedev(major_number, minor_number) != m->file_system)
			continue;
		others = must(realloc(others, (n + 1) * sizeof(*others)));
		others[n++] = id;
	}
	*ret = others;
	*ret_n = n;
	return 0;
}
