/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "world.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <rdma/ib_user_ioctl_cmds.h>
#include <rdma/rdma_user_ioctl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/pinbroker-verbs.h"

/*
 * libpinbroker-verbs against the real daemon, without an RDMA device: an io_uring stands in for the
 * device context and its fixed buffers for the regions, so that there are handles that the kernel
 * reuses, real pins, and a daemon that destroys them by force (I2, I8).
 */

#define LENGTH 0x10000
#define SLOTS  8U

/* What `ibv_…` calls find here. */
static struct {
	pthread_mutex_t lock;
	struct io_uring ring;
	struct ibv_context verbs;
	struct ibv_pd pd;
	struct ibv_mr *slots[SLOTS]; /* by handle */
	uint32_t last_key;
	bool provable; /* its proof; the daemon itself knows io_urings as "claimed" */
	bool open, removed;
	long base; /* pinned pages before */
	unsigned n_registered, n_deregistered, n_unimported, n_queried;
	int dereg_error;                /* the next one fails so, … */
	unsigned n_more_errors;         /* … and so many after it */
	int unpin_error;                /* the next one is done, but answered so */
	int bind_error;                 /* the next one is not done */
	unsigned pins_at_dereg;         /* that the daemon knew of */
	void (*registering)(void *arg); /* called from within ibv_reg_mr() */
	void *arg;
} device;

static struct {
	pinbroker *pb;
	pinbroker_file *file;
	char *map;
	unsigned n_notices;
	bool ignore;
	int found; /* errno of the last pinbroker_find_mr(), 0: it was there and was let go of */
} holder;

static int count_pin(const struct pinbroker_pin_info *info, void *userdata)
{
	++*(unsigned *)userdata;
	return 0;
}

static unsigned count_pins(void)
{
	unsigned n = 0;

	assert_int_equal(pinbroker_list_pins(holder.pb, 0, 0, count_pin, &n), 0);
	return n;
}

static int count_context(const struct pinbroker_context_info *info, void *userdata)
{
	++*(unsigned *)userdata;
	return 0;
}

static unsigned count_contexts(void)
{
	unsigned n = 0;

	assert_int_equal(pinbroker_list_contexts(holder.pb, 0, count_context, &n), 0);
	return n;
}

/* ---- The device ---- */

struct ibv_mr *__wrap_ibv_reg_mr_iova2(
	struct ibv_pd *pd, void *addr, size_t length, uint64_t iova, unsigned access);
struct ibv_mr *__wrap_ibv_reg_mr_iova2(
	struct ibv_pd *pd, void *addr, size_t length, uint64_t iova, unsigned access)
{
	struct iovec iov = {addr, length};
	struct ibv_mr *mr = calloc(1, sizeof(*mr));
	uint32_t handle = 0;
	int r;

	assert_non_null(mr);
	pthread_mutex_lock(&device.lock);
	while (device.slots[handle])
		handle++;
	assert_true(handle < SLOTS);
	r = io_uring_register_buffers_update_tag(&device.ring, handle, &iov, NULL, 1);
	/* as rxe does */
	*mr = (struct ibv_mr){pd->context, pd, addr, length, handle, ++device.last_key, 0};
	if (access & IBV_ACCESS_REMOTE_WRITE)
		mr->rkey = mr->lkey;
	if (r == 1) {
		device.slots[handle] = mr;
		device.n_registered++;
	}
	pthread_mutex_unlock(&device.lock);
	if (r != 1) {
		free(mr);
		errno = -r;
		return NULL;
	}
	if (device.registering)
		device.registering(device.arg);
	return mr;
}

/* As the kernel does, it looks at nothing but the handle. */
int __wrap_ibv_dereg_mr(struct ibv_mr *mr);
int __wrap_ibv_dereg_mr(struct ibv_mr *mr)
{
	struct iovec none = {};
	int r = device.dereg_error;

	device.pins_at_dereg = count_pins();
	if (r == 0 || device.n_more_errors == 0)
		device.dereg_error = 0;
	else
		device.n_more_errors--;
	if (r != 0)
		return r;
	pthread_mutex_lock(&device.lock);
	device.n_deregistered++;
	if (device.slots[mr->handle])
		assert_int_equal(io_uring_register_buffers_update_tag(
					 &device.ring, mr->handle, &none, NULL, 1),
			1);
	else
		r = ENOENT;
	device.slots[mr->handle] = NULL;
	pthread_mutex_unlock(&device.lock);
	if (r == 0)
		free(mr);
	return r;
}

void __wrap_ibv_unimport_mr(struct ibv_mr *mr);
void __wrap_ibv_unimport_mr(struct ibv_mr *mr)
{
	device.n_unimported++;
	free(mr);
}

int __wrap_ibv_close_device(struct ibv_context *context);
int __wrap_ibv_close_device(struct ibv_context *context)
{
	assert_ptr_equal(context, &device.verbs);
	assert_int_equal(count_contexts(), 0);
	device.open = false;
	return 0;
}

/* Asked for a region by its handle. */
int __wrap_ioctl(int fd, unsigned long request, void *arg);
int __wrap_ioctl(int fd, unsigned long request, void *arg)
{
	const struct ib_uverbs_ioctl_hdr *header = arg;
	const struct ibv_mr *mr;

	assert_int_equal(request, RDMA_VERBS_IOCTL);
	assert_int_equal(header->method_id, UVERBS_METHOD_QUERY_MR);
	device.n_queried++;
	if (device.removed) {
		errno = EIO;
		return -1;
	}
	if (header->driver_id != 14) {
		errno = EINVAL;
		return -1;
	}
	mr = device.slots[header->attrs[0].data];
	if (!mr) {
		errno = ENOENT;
		return -1;
	}
	for (unsigned i = 1; i < header->num_attrs; i++) {
		void *out = (void *)(uintptr_t)header->attrs[i].data;

		if (header->attrs[i].attr_id == UVERBS_ATTR_QUERY_MR_RESP_LKEY)
			memcpy(out, &mr->lkey, sizeof(mr->lkey));
		if (header->attrs[i].attr_id == UVERBS_ATTR_QUERY_MR_RESP_RKEY)
			memcpy(out, &mr->rkey, sizeof(mr->rkey));
		if (header->attrs[i].attr_id == UVERBS_ATTR_QUERY_MR_RESP_LENGTH)
			memcpy(out, &mr->length, sizeof(mr->length));
	}
	return 0;
}

int __wrap_pinbroker_add_context(pinbroker *pb, int fd, const char *label, pinbroker_context **ret);
int __wrap_pinbroker_add_context(pinbroker *pb, int fd, const char *label, pinbroker_context **ret)
{
	return pinbroker_add_context_remote(pb, fd, label, ret);
}

enum pinbroker_proof __wrap_pinbroker_context_get_proof(const pinbroker_context *context);
enum pinbroker_proof __wrap_pinbroker_context_get_proof(const pinbroker_context *context)
{
	return device.provable ? PINBROKER_PROOF_PROVABLE : PINBROKER_PROOF_CLAIMED;
}

int __real_pinbroker_bind(pinbroker *pb, uint64_t pin, uint64_t handle);
int __wrap_pinbroker_bind(pinbroker *pb, uint64_t pin, uint64_t handle);
int __wrap_pinbroker_bind(pinbroker *pb, uint64_t pin, uint64_t handle)
{
	int r = device.bind_error;

	device.bind_error = 0;
	return r < 0 ? r : __real_pinbroker_bind(pb, pin, handle);
}

int __real_pinbroker_unpin(pinbroker *pb, const uint64_t *pins, size_t n_pins, uint64_t *ret_ended,
	size_t *ret_n_ended);
int __wrap_pinbroker_unpin(pinbroker *pb, const uint64_t *pins, size_t n_pins, uint64_t *ret_ended,
	size_t *ret_n_ended);
int __wrap_pinbroker_unpin(pinbroker *pb, const uint64_t *pins, size_t n_pins, uint64_t *ret_ended,
	size_t *ret_n_ended)
{
	int error = device.unpin_error, r;

	device.unpin_error = 0;
	r = __real_pinbroker_unpin(pb, pins, n_pins, ret_ended, error < 0 ? NULL : ret_n_ended);
	return error < 0 ? error : r;
}

/* ---- The holder ---- */

static void on_revoke(pinbroker *pb, const struct pinbroker_notice *notice, void *userdata)
{
	holder.n_notices++;
	for (size_t i = 0; i < notice->n_pins && !holder.ignore; i++) {
		struct ibv_mr *mr = pinbroker_find_mr(pb, notice->pins[i]);

		holder.found = mr ? 0 : errno;
		if (mr)
			assert_int_equal(pinbroker_dereg_mr(pb, mr), 0);
	}
}

static void begin(const char *config)
{
	world_start(config);
	mount_fs("tmpfs");
	make_file();
	memset(&device, 0, sizeof(device));
	memset(&holder, 0, sizeof(holder));
	pthread_mutex_init(&device.lock, NULL);
	assert_int_equal(io_uring_queue_init(8, &device.ring, 0), 0);
	assert_int_equal(io_uring_register_buffers_sparse(&device.ring, SLOTS), 0);
	device.verbs.cmd_fd = device.ring.ring_fd;
	device.pd.context = &device.verbs;
	device.open = device.provable = true;
	device.base = pinned();

	assert_int_equal(pinbroker_new("test verbs", socket_path, &holder.pb), 0);
	pinbroker_set_channels(holder.pb, PINBROKER_CHANNEL_WATCH);
	pinbroker_set_revoke_callback(holder.pb, on_revoke, NULL);
	assert_int_equal(pinbroker_connect(holder.pb), 0);
	assert_int_equal(
		pinbroker_open_file(holder.pb, file_path, PINBROKER_WRITE, &holder.file), 0);
	holder.map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
		pinbroker_file_get_fd(holder.file), 0);
	assert_ptr_not_equal(holder.map, MAP_FAILED);
}

static struct ibv_mr *try_region(unsigned i, int access)
{
	return pinbroker_reg_mr(holder.pb, holder.file, i * LENGTH, &device.pd,
		holder.map + i * LENGTH, LENGTH, access);
}

static struct ibv_mr *new_region(unsigned i)
{
	struct ibv_mr *mr = try_region(i, IBV_ACCESS_LOCAL_WRITE);

	if (!mr)
		fail_msg("%s: %s", strerror(errno), pinbroker_last_error(holder.pb)->message);
	return mr;
}

static int dereg(struct ibv_mr *mr)
{
	return pinbroker_dereg_mr(holder.pb, mr);
}

static void end(void)
{
	munmap(holder.map, SIZE);
	if (device.open)
		assert_int_equal(pinbroker_close_device(holder.pb, &device.verbs), 0);
	assert_false(device.open);
	assert_int_equal(pinbroker_close_file(holder.file), 0);
	io_uring_queue_exit(&device.ring);
	wait_pinned(device.base, 0);
	pinbroker_unref(holder.pb);
	world_stop();
}

/* A truncate that goes through as soon as the holder has let go or was made to. */
static void see_truncate(void)
{
	struct pollfd pfd[2] = {{.fd = pinbroker_get_fd(holder.pb), .events = POLLIN}};
	pid_t pid = truncate_start(&pfd[1].fd);

	pfd[1].events = POLLIN;
	while (!pfd[1].revents) {
		assert_true(poll(pfd, 2, WAIT_MSEC) >= 1);
		assert_true(pinbroker_dispatch(holder.pb) >= 0);
	}
	assert_int_equal(truncate_finish(pid, pfd[1].fd).error, 0);
}

/* ---- Tests ---- */

static void test_order_where_provable(void **state)
{
	long base = pinned();
	struct ibv_mr *mr;

	begin("");
	mr = new_region(0);
	expect_pinned(pinned(), base, LENGTH / PAGE);
	assert_int_equal(count_pins(), 1);
	assert_int_equal(dereg(mr), 0);
	assert_int_equal(device.n_deregistered, 1);
	assert_int_equal(device.pins_at_dereg, 0);
	wait_pinned(base, 0);
	end();
}

static void test_order_where_claimed(void **state)
{
	begin("");
	device.provable = false;
	assert_int_equal(dereg(new_region(0)), 0);
	assert_int_equal(device.n_deregistered, 1);
	assert_int_equal(device.pins_at_dereg, 1);
	assert_int_equal(count_pins(), 0);
	end();
}

static int expect_access(const struct pinbroker_pin_info *info, void *userdata)
{
	const struct pinbroker_pin_info *expected = userdata;

	assert_int_equal(info->access, expected->access);
	assert_int_equal(info->on_demand, expected->on_demand);
	assert_int_equal(info->offset, LENGTH);
	assert_int_equal(info->length, LENGTH);
	assert_int_equal(info->handle, 0);
	return 0;
}

static void test_access(void **state)
{
	static const struct {
		int verbs;
		enum pinbroker_access pin;
	} cases[] = {
		{0, PINBROKER_READ},
		{IBV_ACCESS_ON_DEMAND | IBV_ACCESS_REMOTE_READ, PINBROKER_READ},
		{IBV_ACCESS_ON_DEMAND | IBV_ACCESS_LOCAL_WRITE, PINBROKER_WRITE},
		{IBV_ACCESS_REMOTE_READ | IBV_ACCESS_RELAXED_ORDERING, PINBROKER_READ},
		{IBV_ACCESS_LOCAL_WRITE, PINBROKER_WRITE},
		{IBV_ACCESS_REMOTE_ATOMIC | IBV_ACCESS_LOCAL_WRITE, PINBROKER_WRITE},
		{IBV_ACCESS_MW_BIND, PINBROKER_WRITE},
	};

	begin("");
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		const struct pinbroker_pin_info expected = {
			.access = cases[i].pin,
			.on_demand = cases[i].verbs & IBV_ACCESS_ON_DEMAND,
		};
		struct ibv_mr *mr = try_region(1, cases[i].verbs);

		assert_non_null(mr);
		assert_int_equal(pinbroker_list_pins(holder.pb, 0, 0, expect_access, (void *)&expected), 0);
		assert_int_equal(dereg(mr), 0);
	}
	/* refused by the broker, and by the device */
	assert_null(try_region(SIZE / LENGTH, 0));
	assert_int_equal(errno, ERANGE);
	munmap(holder.map + LENGTH, LENGTH);
	assert_null(try_region(1, 0));
	assert_int_equal(errno, EFAULT);
	assert_int_equal(count_pins(), 0);
	end();
}

static void test_truncate(void **state)
{
	begin("");
	new_region(0);
	new_region(1);
	see_truncate();
	assert_int_equal(device.n_deregistered, 2);
	assert_int_equal(count_pins(), 0);
	end();
}

/* After a region was destroyed the kernel gives its handle to another. */
static struct ibv_mr *reuse_handle(const struct ibv_mr *mr)
{
	struct ibv_mr *other;

	device.slots[mr->handle] = NULL;
	assert_int_equal(ftruncate(pinbroker_file_get_fd(holder.file), SIZE), 0);
	other = new_region(0);
	assert_int_equal(other->handle, mr->handle);
	return other;
}

/* The daemon destroys a region, and the kernel gives its handle to the next. */
static void test_ended_handle_is_left_alone(void **state)
{
	long base = pinned();
	struct ibv_mr *mr, *other;

	begin("[Revocation]\nRevokeGraceSec=100ms\nSignalOnTimeout=none\n");
	mr = new_region(1);
	holder.ignore = true;
	see_truncate();
	assert_true(holder.n_notices > 0);
	wait_pinned(base, 0);
	other = reuse_handle(mr);
	assert_int_equal(dereg(mr), 0);
	assert_int_equal(device.n_deregistered, 0);
	assert_int_equal(device.n_unimported, 1);
	assert_int_equal(device.n_queried, 0);
	assert_ptr_equal(device.slots[0], other);
	expect_pinned(pinned(), base, LENGTH / PAGE);
	assert_int_equal(dereg(mr), -ENOENT);

	assert_int_equal(dereg(other), 0);
	assert_int_equal(device.n_deregistered, 1);
	end();
}

/* The answer of Unpin that said so was lost. */
static void test_lost_answer(void **state)
{
	struct ibv_mr *mr, *other;

	begin("[Revocation]\nRevokeGraceSec=100ms\nSignalOnTimeout=none\n");
	mr = new_region(1);
	holder.ignore = true;
	see_truncate();
	other = reuse_handle(mr);
	device.unpin_error = -ECONNRESET;
	assert_int_equal(dereg(mr), 0);
	assert_int_equal(device.n_unimported, 1);
	assert_true(device.n_queried > 0);
	assert_ptr_equal(device.slots[0], other);

	/* This one is still its own. (Of io_urings the daemon forgets the pin at once.) */
	device.unpin_error = -ECONNRESET;
	assert_int_equal(dereg(other), 0);
	assert_int_equal(device.n_unimported, 1);
	assert_int_equal(device.n_deregistered, 1);
	end();
}

static void test_lost_broker(void **state)
{
	struct ibv_mr *mr, *gone;

	begin("");
	mr = new_region(0);
	gone = new_region(1);
	finish(daemon_pid, SIGKILL);
	start_daemon();
	while (pinbroker_dispatch(holder.pb) != -ENOTRECOVERABLE)
		poll(&(struct pollfd){pinbroker_get_fd(holder.pb), POLLIN, 0}, 1, WAIT_MSEC);
	assert_null(try_region(2, 0));
	assert_int_equal(errno, ENOTRECOVERABLE);

	device.slots[gone->handle] = NULL;
	assert_int_equal(dereg(gone), 0);
	assert_int_equal(device.n_deregistered, 0);
	assert_int_equal(device.n_unimported, 1);
	assert_int_equal(pinbroker_close_device(holder.pb, &device.verbs), -EBUSY);
	assert_int_equal(dereg(mr), 0);
	assert_int_equal(device.n_deregistered, 1);
	assert_int_equal(pinbroker_close_device(holder.pb, &device.verbs), 0);
	pinbroker_file_free(holder.file);
	munmap(holder.map, SIZE);
	io_uring_queue_exit(&device.ring);
	wait_pinned(device.base, 0);
	pinbroker_unref(holder.pb);
	world_stop();
}

/* A memory window is in the way. */
static void test_failed_deregistration(void **state)
{
	struct ibv_mr *mr;

	begin("");
	mr = new_region(0);
	device.dereg_error = EBUSY;
	device.n_more_errors = 9;
	assert_int_equal(dereg(mr), -EBUSY);
	assert_int_equal(device.n_deregistered, 0);
	assert_int_equal(pinbroker_close_device(holder.pb, &device.verbs), -EBUSY);
	assert_int_equal(dereg(mr), 0);
	assert_int_equal(device.n_deregistered, 1);
	/* the daemon is looking at it */
	mr = new_region(0);
	device.dereg_error = EBUSY;
	device.n_more_errors = 2;
	assert_int_equal(dereg(mr), 0);
	assert_int_equal(device.n_deregistered, 2);
	/* firmware */
	mr = new_region(0);
	device.dereg_error = EIO;
	assert_int_equal(dereg(mr), -EIO);
	/* the device has been removed */
	device.removed = true;
	device.dereg_error = EIO;
	assert_int_equal(dereg(mr), 0);
	assert_int_equal(device.n_unimported, 1);
	device.removed = false;
	device.slots[0] = NULL;
	/* the daemon destroys it just before */
	mr = new_region(0);
	device.slots[0] = NULL;
	assert_int_equal(dereg(mr), 0);
	assert_int_equal(device.n_unimported, 2);
	end();
}

struct truncater {
	pid_t pid;
	int fd;
};

static void truncate_and_wait_for_notice(void *arg)
{
	struct pollfd pfd = {.fd = pinbroker_get_fd(holder.pb), .events = POLLIN};
	struct truncater *t = arg;

	device.registering = NULL;
	t->pid = truncate_start(&t->fd);
	while (holder.n_notices == 0) {
		assert_int_equal(poll(&pfd, 1, WAIT_MSEC), 1);
		assert_true(pinbroker_dispatch(holder.pb) >= 0);
	}
}

static void test_revoked_while_registering(void **state)
{
	struct truncater truncater;

	begin("");
	device.registering = truncate_and_wait_for_notice;
	device.arg = &truncater;
	assert_null(try_region(1, IBV_ACCESS_LOCAL_WRITE));
	assert_int_equal(errno, ESTALE);
	assert_int_equal(holder.found, EINPROGRESS);
	assert_int_equal(device.n_deregistered, 1);
	assert_int_equal(truncate_finish(truncater.pid, truncater.fd).error, 0);
	assert_int_equal(count_pins(), 0);
	end();
}

static void test_refused_bind(void **state)
{
	begin("");
	device.bind_error = -ESTALE;
	assert_null(try_region(1, IBV_ACCESS_LOCAL_WRITE));
	assert_int_equal(errno, ESTALE);
	assert_int_equal(device.n_deregistered, 1);
	assert_int_equal(count_pins(), 0);
	device.bind_error = -ECONNRESET;
	assert_int_equal(dereg(new_region(1)), 0);
	end();
}

static void test_close_device(void **state)
{
	struct ibv_mr *mr;

	begin("");
	mr = new_region(0);
	assert_int_equal(count_contexts(), 1);
	assert_int_equal(pinbroker_close_device(holder.pb, &device.verbs), -EBUSY);
	assert_true(device.open);
	assert_int_equal(dereg(mr), 0);
	assert_int_equal(pinbroker_close_device(holder.pb, &device.verbs), 0);
	assert_false(device.open);
	/* one that the broker never heard of */
	device.open = true;
	end();
}

#define ROUNDS 50

static void *work(void *arg)
{
	unsigned i = (unsigned)(uintptr_t)arg;

	for (unsigned round = 0; round < ROUNDS; round++)
		assert_int_equal(dereg(new_region(i)), 0);
	return new_region(i);
}

static void test_threads(void **state)
{
	pthread_t threads[4];

	begin("");
	for (uintptr_t i = 0; i < 4; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, work, (void *)i), 0);
	for (size_t i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	assert_int_equal(count_contexts(), 1);
	assert_int_equal(count_pins(), 4);
	assert_int_equal(device.n_deregistered, 4 * ROUNDS);
	see_truncate();
	assert_int_equal(device.n_deregistered, 4 * ROUNDS + 4);
	end();
}

/* Locks are held where the registering thread is forked. */
static void fork_child(void *arg)
{
	struct ibv_mr *mr = arg;
	int status;
	pid_t pid;

	device.registering = NULL;
	pid = fork();
	if (pid == 0) {
		bool ok;

		alarm(WAIT_MSEC / 1000);
		ok = !try_region(1, 0) && errno == ECHILD && dereg(mr) == -ECHILD &&
		     !pinbroker_find_mr(holder.pb, 1) && errno == ECHILD &&
		     pinbroker_close_device(holder.pb, &device.verbs) == -ECHILD;
		_exit(ok ? 0 : 1);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
}

static void test_child(void **state)
{
	struct ibv_mr *mr;

	begin("");
	mr = new_region(0);
	device.registering = fork_child;
	device.arg = mr;
	assert_int_equal(dereg(new_region(1)), 0);
	assert_int_equal(device.n_deregistered, 1);
	assert_int_equal(dereg(mr), 0);
	assert_null(pinbroker_find_mr(holder.pb, 1));
	assert_int_equal(errno, ENOENT);
	end();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_order_where_provable),
		cmocka_unit_test(test_order_where_claimed),
		cmocka_unit_test(test_access),
		cmocka_unit_test(test_truncate),
		cmocka_unit_test(test_ended_handle_is_left_alone),
		cmocka_unit_test(test_lost_answer),
		cmocka_unit_test(test_lost_broker),
		cmocka_unit_test(test_failed_deregistration),
		cmocka_unit_test(test_revoked_while_registering),
		cmocka_unit_test(test_refused_bind),
		cmocka_unit_test(test_close_device),
		cmocka_unit_test(test_threads),
		cmocka_unit_test(test_child),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
