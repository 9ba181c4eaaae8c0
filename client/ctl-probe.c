/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-probe.h"
#include "ctl-region.h"
#include "ctl-try.h"

#include <fcntl.h>
#include <libgen.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/utsname.h>

const char *backing_name(enum backing backing)
{
	static const char *const names[] = {
		[BACKING_PAGE_CACHE] = "page cache",
		[BACKING_SHMEM] = "tmpfs",
		[BACKING_HUGE_PAGES] = "hugetlbfs",
		[BACKING_FSDAX] = "fsdax",
		[BACKING_DEVICE_DAX] = "device-dax",
		[BACKING_OTHER] = "none",
	};

	return names[backing];
}

static bool is_device_dax(const struct statx *stx)
{
	char path[64], link[PATH_MAX];
	ssize_t n;

	snprintf(path, sizeof(path), "/sys/dev/char/%u:%u/subsystem", stx->stx_rdev_major,
		stx->stx_rdev_minor);
	n = readlink(path, link, sizeof(link) - 1);
	if (n < 4)
		return false;
	link[n] = 0;
	return strcmp(link + n - 4, "/dax") == 0;
}

static enum backing backing_of(const struct statx *stx, const struct mount *mount)
{
	if (S_ISCHR(stx->stx_mode) && is_device_dax(stx))
		return BACKING_DEVICE_DAX;
	if (!S_ISREG(stx->stx_mode))
		return BACKING_OTHER;
	if (stx->stx_attributes & STATX_ATTR_DAX)
		return BACKING_FSDAX;
	if (strcmp(mount->type, "tmpfs") == 0)
		return BACKING_SHMEM;
	if (strcmp(mount->type, "hugetlbfs") == 0)
		return BACKING_HUGE_PAGES;
	return BACKING_PAGE_CACHE;
}

/* What pins are tried on. */
struct sample {
	int fd; /* owned; -1: there is none */
	size_t size;
};

static void sample_close(struct sample *sample)
{
	if (sample->fd >= 0)
		close(sample->fd);
}

/* One page of a new file; its descriptor is taken over. */
static bool sample_set(struct sample *sample, int new_fd)
{
	_cleanup_(close_fdp) int fd = new_fd;
	size_t size;

	if (fd < 0)
		return false;
	size = map_unit(fd);
	if (ftruncate(fd, (off_t)size) < 0)
		return false;
	*sample = (struct sample){TAKE_FD(fd), size};
	return true;
}

/* A nameless file in that directory, if its pages are of the kind wanted. */
static bool sample_make(struct sample *sample, const char *directory, enum backing backing)
{
	_cleanup_(close_fdp) int fd = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	struct mount mount;
	struct statx stx;

	if (fd < 0 || statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &stx) < 0 ||
		mount_of(fd, &mount) < 0 || backing_of(&stx, &mount) != backing)
		return false;
	return sample_set(sample, TAKE_FD(fd));
}

static struct sample sample_find(const char *path, enum backing backing)
{
	_cleanup_(freep) char *copy = must(strdup(path));
	struct sample sample = {-1, 0};

	if (backing == BACKING_DEVICE_DAX) {
		sample.fd = open(path, O_RDWR | O_CLOEXEC);
		sample.size = map_unit(sample.fd);
		return sample;
	}
	if (backing == BACKING_OTHER || sample_make(&sample, dirname(copy), backing) ||
		sample_make(&sample, "/var/tmp", backing))
		return sample;
	if (backing == BACKING_SHMEM)
		sample_set(&sample, memfd_create("pinbrokerctl", MFD_CLOEXEC));
	if (backing == BACKING_HUGE_PAGES)
		sample_set(&sample, memfd_create("pinbrokerctl", MFD_CLOEXEC | MFD_HUGETLB));
	return sample;
}

static bool is_refusal(enum mechanism m, int r)
{
	return r == -EFAULT || r == -EOPNOTSUPP || (r == -EINVAL && m == MECHANISM_RDMA_ODP);
}

static const char *reason_of(
	const struct probe *p, enum mechanism m, enum pinbroker_access access, int r)
{
	if (m == MECHANISM_RDMA_ODP)
		return "the device's driver does not support it";
	if (p->backing == BACKING_FSDAX)
		return "the kernel makes no long-term pins of fsdax pages: on-demand paging is the "
		       "way";
	if (r == -EOPNOTSUPP)
		return "this kernel takes memory of tmpfs and hugetlbfs only";
	if (access == PINBROKER_READ)
		return "it pins for writing, which a read-only mapping refuses";
	return "the kernel refuses it where the file system must be told of every write";
}

static struct verdict refused(
	const struct probe *p, enum mechanism m, enum pinbroker_access access, int r)
{
	return (struct verdict){VERDICT_NO, .error = r, .reason = reason_of(p, m, access, r)};
}

static void probe_map(struct probe *p, const struct sample *sample, enum pinbroker_access access)
{
	int protection = access == PINBROKER_WRITE ? PROT_READ | PROT_WRITE : PROT_READ;
	void *map = mmap(NULL, sample->size, protection, MAP_SHARED, sample->fd, 0);

	if (map == MAP_FAILED)
		return;
	for (enum mechanism m = 0; m < MECHANISMS; m++) {
		struct verdict *v = &p->verdicts[m][access];
		int r = try_pin(m, map, sample->size, access);

		if (r >= 0)
			*v = (struct verdict){VERDICT_YES};
		else if (is_refusal(m, r))
			*v = refused(p, m, access, r);
		v->tried = v->possible != VERDICT_UNKNOWN;
	}
	munmap(map, sample->size);
}

static void probe_try(struct probe *p, const struct sample *sample)
{
	for (unsigned access = 0; access <= PINBROKER_WRITE && sample->fd >= 0; access++)
		probe_map(p, sample, access);
}

static bool kernel_is_at_least(unsigned major_wanted, unsigned minor_wanted)
{
	unsigned major_version = 0, minor_version = 0;
	struct utsname uts;

	if (uname(&uts) < 0 || sscanf(uts.release, "%u.%u", &major_version, &minor_version) != 2)
		return false;
	return major_version > major_wanted ||
	       (major_version == major_wanted && minor_version >= minor_wanted);
}

/* What this kernel says of pins for writing, to whoever could try; an io_uring's own rule apart. */
static struct verdict derive_write(const struct probe *p, enum mechanism m)
{
	static const enum mechanism order[] = {
		MECHANISM_RDMA, MECHANISM_AF_XDP, MECHANISM_IO_URING};
	struct verdict verdict = {VERDICT_UNKNOWN};

	if (p->backing != BACKING_PAGE_CACHE)
		verdict.possible = VERDICT_YES;
	for (size_t i = 0; i < ELEMENTS(order); i++) {
		const struct verdict *v = &p->verdicts[order[i]][PINBROKER_WRITE];

		if (v->tried && v->error != -EOPNOTSUPP) {
			verdict = *v;
			break;
		}
	}
	if (m == MECHANISM_IO_URING && verdict.possible == VERDICT_YES)
		verdict.possible = VERDICT_UNKNOWN;
	if (verdict.possible == VERDICT_UNKNOWN)
		verdict.reason = "it could not be tried";
	return verdict;
}

static struct verdict derive_read(const struct probe *p, enum mechanism m)
{
	if (m == MECHANISM_IO_URING || m == MECHANISM_AF_XDP)
		return refused(p, m, PINBROKER_READ, -EFAULT);
	if (m == MECHANISM_RDMA && !kernel_is_at_least(6, 2))
		return (struct verdict){VERDICT_UNKNOWN,
			.reason = "before Linux 6.2 it pins for writing, which a read-only mapping "
				  "refuses; there is no device to try it on"};
	return (struct verdict){VERDICT_YES};
}

/* Where it could not be tried; memory: what could be on other memory, if that is all there is. */
static struct verdict derive(const struct probe *p, const struct probe *memory, enum mechanism m,
	enum pinbroker_access access)
{
	struct verdict verdict;

	if (p->backing == BACKING_OTHER)
		return (struct verdict){VERDICT_NO, .reason = "it is no data file"};
	if (m != MECHANISM_RDMA_ODP && p->backing == BACKING_FSDAX)
		return refused(p, m, access, -EOPNOTSUPP);
	if (memory->verdicts[m][access].tried &&
		(m == MECHANISM_RDMA_ODP || access == PINBROKER_READ))
		verdict = memory->verdicts[m][access];
	else if (m == MECHANISM_RDMA_ODP)
		verdict = (struct verdict){VERDICT_YES,
			.reason = "nothing is pinned; the device's driver has to support it"};
	else if (access == PINBROKER_READ)
		verdict = derive_read(p, m);
	else
		verdict = derive_write(p, m);
	verdict.tried = false;
	return verdict;
}

void probe_file(
	const char *path, const struct statx *stx, const struct mount *mount, struct probe *ret)
{
	_cleanup_(sample_close) struct sample sample = {-1, 0}, other = {-1, 0};
	struct probe memory = {.backing = BACKING_SHMEM};

	*ret = (struct probe){.backing = backing_of(stx, mount)};
	sample = sample_find(path, ret->backing);
	probe_try(ret, &sample);
	if (sample.fd < 0 && sample_set(&other, memfd_create("pinbrokerctl", MFD_CLOEXEC)))
		probe_try(&memory, &other);
	for (enum mechanism m = 0; m < MECHANISMS; m++)
		for (unsigned access = 0; access <= PINBROKER_WRITE; access++)
			if (ret->verdicts[m][access].possible == VERDICT_UNKNOWN)
				ret->verdicts[m][access] = derive(ret, &memory, m, access);
}
