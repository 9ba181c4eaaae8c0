/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "verbs.h"

#include <errno.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

/* Calls that may be repeated are, when the connection breaks under them. */
#define TRIES 3

#define BUSY_TRIES 10
#define BUSY_USEC  1000

/* The table's locks may have been held when a child was forked. */
static int check_process(pinbroker *pb)
{
	int r = pinbroker_get_fd(pb);

	return r < 0 ? r : 0;
}

static int bind_handle(const struct region *region, const struct ibv_mr *mr)
{
	int r = -ECONNRESET;

	for (int i = 0; i < TRIES && r == -ECONNRESET; i++)
		r = pinbroker_bind(region->device->pb, region->pin, mr->handle);
	return r;
}

/* -ENOENT: the broker has seen it gone. */
static int unpin(const struct region *region, size_t *ret_n_ended)
{
	int r = -ECONNRESET;

	for (int i = 0; i < TRIES && r == -ECONNRESET; i++)
		r = pinbroker_unpin(region->device->pb, &region->pin, 1, NULL, ret_n_ended);
	return r;
}

/* ---- Letting go ---- */

/* Of a region that is gone only what libibverbs allocated is left. Frees it without a word to the
 * kernel, or, with most providers, does nothing. */
static void forget(struct ibv_mr *mr)
{
	ibv_unimport_mr(mr);
}

/* EBUSY: the broker may be looking at it, for some microseconds. */
static int try_to_deregister(struct ibv_mr *mr)
{
	int r = -EBUSY;

	for (int i = 0; i < BUSY_TRIES && r == -EBUSY; i++) {
		if (i > 0)
			usleep(BUSY_USEC);
		r = ibv_dereg_mr(mr);
		r = r > 0 ? -r : r;
	}
	return r;
}

static int deregister(struct ibv_mr *mr)
{
	int r = try_to_deregister(mr);

	if (r == -EIO && handle_is_of(mr) == 0)
		r = -ENOENT;
	if (r != -ENOENT)
		return r;
	/* The broker was faster, or the device is gone. */
	forget(mr);
	return 0;
}

/* Lets go of the pin. Returns whether the handle is still the region's: 1 or 0. */
static int unpin_handle(const struct region *region, const struct ibv_mr *mr)
{
	size_t n_ended = 0;
	int r;

	r = unpin(region, &n_ended);
	/* The broker does not know (any more) whether it has destroyed it. */
	if (r == -ENOENT || r == -ENOTRECOVERABLE)
		return handle_is_of(mr);
	return r < 0 ? r : n_ended == 0;
}

static int let_go_provable(const struct region *region, struct ibv_mr *mr)
{
	int r;

	r = unpin_handle(region, mr);
	if (r > 0)
		return deregister(mr);
	if (r == 0)
		forget(mr);
	return r;
}

/* Nothing is detached by force here. */
static int let_go_claimed(const struct region *region, struct ibv_mr *mr)
{
	int r;

	r = deregister(mr);
	if (r == 0)
		(void)unpin(region, NULL);
	return r;
}

/* With the device's handles locked for writing. */
static int let_go(const struct region *region, struct ibv_mr *mr)
{
	if (pinbroker_context_get_proof(region->device->context) == PINBROKER_PROOF_PROVABLE)
		return let_go_provable(region, mr);
	return let_go_claimed(region, mr);
}

EXPORT int pinbroker_dereg_mr(pinbroker *pb, struct ibv_mr *mr)
{
	struct region *region;
	struct device *d;
	int r;

	r = check_process(pb);
	if (r < 0)
		return r;
	d = region_find_device(pb, mr);
	if (!d)
		return -ENOENT;
	pthread_rwlock_wrlock(&d->handles);
	/* Another thread may have been faster. */
	region = region_hide(pb, mr);
	r = region ? let_go(region, mr) : -ENOENT;
	if (r == 0)
		region_free(region);
	else if (region)
		region_show(region, mr);
	pthread_rwlock_unlock(&d->handles);
	device_put(d);
	return r;
}

/* ---- Registering ---- */

static int device_add(struct device *d)
{
	int r = 0;

	pthread_mutex_lock(&d->adding);
	if (!d->context)
		r = pinbroker_add_context(d->pb, d->verbs->cmd_fd, NULL, &d->context);
	pthread_mutex_unlock(&d->adding);
	return r;
}

/* A failed registration. mr: NULL if it did not come so far. */
static void abandon(struct region *region, struct ibv_mr *mr, bool bound)
{
	struct device *d = region->device;

	pthread_rwlock_wrlock(&d->handles);
	if (bound)
		(void)let_go(region, mr);
	else if (mr)
		(void)deregister(mr); /* the broker has no handle that it could destroy */
	pthread_rwlock_unlock(&d->handles);
	if (!bound)
		(void)unpin(region, NULL);
	region_free(region);
}

static int register_region(struct region *region, struct ibv_pd *pd, void *addr, size_t length,
	int access, struct ibv_mr **ret)
{
	bool bound = false;
	struct ibv_mr *mr;
	int r;

	pthread_rwlock_rdlock(&region->device->handles);
	mr = ibv_reg_mr(pd, addr, length, access);
	r = mr ? 0 : errno > 0 ? -errno : -EIO;
	pthread_rwlock_unlock(&region->device->handles);
	if (r == 0) {
		r = bind_handle(region, mr);
		bound = r == 0;
	}
	if (bound && !region_publish(region, mr))
		r = -ESTALE;
	if (r == 0)
		*ret = mr;
	else
		abandon(region, mr, bound);
	return r;
}

static int reg_mr(pinbroker *pb, const pinbroker_file *file, const struct pinbroker_range *range,
	struct ibv_pd *pd, void *addr, int access, struct ibv_mr **ret)
{
	struct region *region;
	struct device *d;
	int r;

	r = check_process(pb);
	if (r < 0)
		return r;
	d = device_get(pb, pd->context);
	if (!d)
		return -ENOMEM;
	r = device_add(d);
	if (r == 0)
		r = region_new(d, file, range, access, &region);
	if (r == 0)
		r = register_region(region, pd, addr, range->length, access, ret);
	device_put(d);
	return r;
}

EXPORT struct ibv_mr *pinbroker_reg_mr(pinbroker *pb, const pinbroker_file *file, uint64_t offset,
	struct ibv_pd *pd, void *addr, size_t length, int access)
{
	const struct pinbroker_range range = {offset, length};
	struct ibv_mr *mr = NULL;
	int r;

	r = reg_mr(pb, file, &range, pd, addr, access, &mr);
	if (r < 0)
		errno = -r;
	return mr;
}

EXPORT struct ibv_mr *pinbroker_find_mr(pinbroker *pb, uint64_t pin)
{
	int r;

	r = check_process(pb);
	if (r < 0) {
		errno = -r;
		return NULL;
	}
	return region_find_mr(pb, pin);
}

/* ---- The end ---- */

/* -ENOENT, -ENOTRECOVERABLE: the broker does not have it any more. */
static int device_remove(struct device *d)
{
	int r = -ECONNRESET;

	for (int i = 0; i < TRIES && r == -ECONNRESET; i++)
		r = pinbroker_remove_context(d->context);
	if (r == 0)
		d->context = NULL;
	return r == -ENOENT || r == -ENOTRECOVERABLE ? 0 : r;
}

EXPORT int pinbroker_close_device(pinbroker *pb, struct ibv_context *context)
{
	struct device *d;
	int r;

	r = check_process(pb);
	if (r < 0)
		return r;
	r = device_take(pb, context, &d);
	if (r < 0)
		return r;
	if (d) {
		r = device_remove(d);
		if (r < 0) {
			device_restore(d);
			return r;
		}
		device_free(d);
	}
	return ibv_close_device(context) == 0 ? 0 : -EIO;
}
