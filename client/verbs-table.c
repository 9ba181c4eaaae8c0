/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "verbs.h"

#include <errno.h>

#include "protocol/macro.h"

/* What lets the device, or somebody else through it, write. */
#define ACCESS_WRITE                                                                   \
	(IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC | \
		IBV_ACCESS_MW_BIND)

static int compare(const void *a, const void *b)
{
	return ((uintptr_t)a > (uintptr_t)b) - ((uintptr_t)a < (uintptr_t)b);
}

/* The pins of several brokers may have the same numbers. */
static int compare_pin(const struct region *a, const struct region *b)
{
	if (a->pin != b->pin)
		return a->pin > b->pin ? 1 : -1;
	return compare(a->device->pb, b->device->pb);
}

static int compare_mr(const struct region *a, const struct region *b)
{
	return compare(a->mr, b->mr);
}

RB_HEAD(by_pin, region);
RB_HEAD(by_mr, region);
TREE_GENERATE(by_pin, region, by_pin, compare_pin)
TREE_GENERATE(by_mr, region, by_mr, compare_mr)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static LIST_HEAD(, device) devices = LIST_HEAD_INITIALIZER(devices);
static struct by_pin regions_by_pin = RB_INITIALIZER(&regions_by_pin);
static struct by_mr regions_by_mr = RB_INITIALIZER(&regions_by_mr);

/* ---- Devices ---- */

static struct device *device_new(pinbroker *pb, struct ibv_context *verbs)
{
	struct device *d = calloc(1, sizeof(*d));
	pthread_rwlockattr_t attributes;

	if (!d)
		return NULL;
	d->pb = pb;
	d->verbs = verbs;
	pthread_mutex_init(&d->adding, NULL);
	/* Letting go must not wait for registrations that have yet to begin. */
	pthread_rwlockattr_init(&attributes);
	pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&d->handles, &attributes);
	pthread_rwlockattr_destroy(&attributes);
	LIST_INSERT_HEAD(&devices, d, link);
	return d;
}

void device_free(struct device *d)
{
	pinbroker_context_free(d->context);
	pthread_rwlock_destroy(&d->handles);
	pthread_mutex_destroy(&d->adding);
	free(d);
}

static struct device *device_find(pinbroker *pb, struct ibv_context *verbs)
{
	struct device *d;

	LIST_FOREACH (d, &devices, link)
		if (d->pb == pb && d->verbs == verbs)
			return d;
	return NULL;
}

struct device *device_get(pinbroker *pb, struct ibv_context *verbs)
{
	struct device *d;

	pthread_mutex_lock(&lock);
	d = device_find(pb, verbs) ?: device_new(pb, verbs);
	if (d)
		d->n_users++;
	pthread_mutex_unlock(&lock);
	return d;
}

static void device_drop(struct device *d)
{
	if (--d->n_users > 0 || d->context)
		return;
	LIST_REMOVE(d, link);
	device_free(d);
}

void device_put(struct device *d)
{
	pthread_mutex_lock(&lock);
	device_drop(d);
	pthread_mutex_unlock(&lock);
}

int device_take(pinbroker *pb, struct ibv_context *verbs, struct device **ret)
{
	struct device *d, *found = NULL;
	int r = 0;

	pthread_mutex_lock(&lock);
	LIST_FOREACH (d, &devices, link) {
		if (d->verbs != verbs)
			continue;
		if (d->pb != pb || d->n_users > 0)
			r = -EBUSY;
		found = d;
	}
	if (r == 0 && found)
		LIST_REMOVE(found, link);
	pthread_mutex_unlock(&lock);
	if (r == 0)
		*ret = found;
	return r;
}

void device_restore(struct device *d)
{
	pthread_mutex_lock(&lock);
	LIST_INSERT_HEAD(&devices, d, link);
	pthread_mutex_unlock(&lock);
}

/* ---- Regions ---- */

int region_new(struct device *d, const pinbroker_file *file, const struct pinbroker_range *range,
	int access, struct region **ret)
{
	struct region *region = calloc(1, sizeof(*region));
	int r;

	if (!region)
		return -ENOMEM;
	region->device = d;
	/* Who looks for the pin waits as long as his own next call to the broker would. */
	pthread_mutex_lock(&lock);
	r = (access & IBV_ACCESS_ON_DEMAND ? pinbroker_pin_on_demand : pinbroker_pin)(d->pb, file,
		d->context, range, 1, access & ACCESS_WRITE ? PINBROKER_WRITE : PINBROKER_READ, NULL,
		&region->pin);
	if (r == 0) {
		d->n_users++;
		by_pin_RB_INSERT(&regions_by_pin, region);
	}
	pthread_mutex_unlock(&lock);
	if (r == 0)
		*ret = region;
	else
		free(region);
	return r;
}

static void show(struct region *region, struct ibv_mr *mr)
{
	region->mr = mr;
	by_mr_RB_INSERT(&regions_by_mr, region);
}

bool region_publish(struct region *region, struct ibv_mr *mr)
{
	bool usable;

	pthread_mutex_lock(&lock);
	usable = !region->revoked;
	if (usable)
		show(region, mr);
	pthread_mutex_unlock(&lock);
	return usable;
}

static struct region *find(pinbroker *pb, struct ibv_mr *mr)
{
	struct region key = {.mr = mr}, *region = by_mr_RB_FIND(&regions_by_mr, &key);

	return region && region->device->pb == pb ? region : NULL;
}

struct device *region_find_device(pinbroker *pb, struct ibv_mr *mr)
{
	struct device *d = NULL;
	struct region *region;

	pthread_mutex_lock(&lock);
	region = find(pb, mr);
	if (region) {
		d = region->device;
		d->n_users++;
	}
	pthread_mutex_unlock(&lock);
	return d;
}

struct region *region_hide(pinbroker *pb, struct ibv_mr *mr)
{
	struct region *region;

	pthread_mutex_lock(&lock);
	region = find(pb, mr);
	if (region) {
		by_mr_RB_REMOVE(&regions_by_mr, region);
		region->mr = NULL;
	}
	pthread_mutex_unlock(&lock);
	return region;
}

void region_show(struct region *region, struct ibv_mr *mr)
{
	pthread_mutex_lock(&lock);
	show(region, mr);
	pthread_mutex_unlock(&lock);
}

void region_free(struct region *region)
{
	pthread_mutex_lock(&lock);
	by_pin_RB_REMOVE(&regions_by_pin, region);
	device_drop(region->device);
	pthread_mutex_unlock(&lock);
	free(region);
}

struct ibv_mr *region_find_mr(pinbroker *pb, uint64_t pin)
{
	struct device device = {.pb = pb};
	struct region key = {.device = &device, .pin = pin}, *region;
	struct ibv_mr *mr = NULL;

	pthread_mutex_lock(&lock);
	region = by_pin_RB_FIND(&regions_by_pin, &key);
	if (region) {
		mr = region->mr;
		region->revoked = true;
	}
	pthread_mutex_unlock(&lock);
	if (!mr)
		errno = region ? EINPROGRESS : ENOENT;
	return mr;
}
