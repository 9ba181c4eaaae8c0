/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "holding.h"

#include <dirent.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

static void on_revoke(pinbroker *pb, const struct pinbroker_notice *n, void *userdata)
{
	struct holding *h = userdata;

	assert_string_equal(n->path, file_path);
	assert_true(n->deadline_usec > usec_now());
	h->seen.n++;
	h->seen.n_updates += n->update;
	h->seen.revocation = n->revocation;
	if (h->on_notice)
		h->on_notice(h, n);
	if (n->pid == 0 || h->seen.let_go)
		return;
	assert_int_equal(pinbroker_unpin(pb, n->pins, n->n_pins, NULL, NULL), 0);
	h->seen.let_go = true;
}

static void on_lost(pinbroker *pb, void *userdata)
{
	struct holding *h = userdata;

	h->seen.n_lost++;
}

void must(pinbroker *pb, int r)
{
	if (r < 0)
		fail_msg("%s", pinbroker_last_error(pb)->message);
}

void holding_connect(struct holding *h, unsigned channels, bool thread)
{
	assert_int_equal(pinbroker_new("test library", socket_path, &h->pb), 0);
	must(h->pb, pinbroker_set_channels(h->pb, channels));
	must(h->pb, pinbroker_set_bus_address(h->pb, bus_address));
	must(h->pb, pinbroker_set_revoke_callback(h->pb, on_revoke, h));
	must(h->pb, pinbroker_set_lost_callback(h->pb, on_lost, h));
	must(h->pb, pinbroker_set_thread(h->pb, thread));
	must(h->pb, pinbroker_connect(h->pb));
	must(h->pb, pinbroker_open_file(h->pb, file_path, PINBROKER_READ, &h->file));
	h->context_fd = eventfd(0, EFD_CLOEXEC);
	must(h->pb, pinbroker_add_context(h->pb, h->context_fd, "none", &h->context));
}

void holding_pin(struct holding *h)
{
	const struct pinbroker_range range = {0, SIZE};

	must(h->pb, pinbroker_pin(
			    h->pb, h->file, h->context, &range, 1, PINBROKER_READ, NULL, &h->pin));
	must(h->pb, pinbroker_bind(h->pb, h->pin, 1));
}

void holding_begin(struct holding *h, unsigned channels)
{
	*h = (struct holding){};
	world_start("");
	mount_fs("tmpfs");
	make_file();
	holding_connect(h, channels, false);
	holding_pin(h);
}

void holding_end(struct holding *h)
{
	must(h->pb, pinbroker_remove_context(h->context));
	must(h->pb, pinbroker_close_file(h->file));
	assert_null(pinbroker_unref(h->pb));
	close(h->context_fd);
}

void holding_drop(struct holding *h)
{
	assert_null(pinbroker_context_free(h->context));
	assert_null(pinbroker_file_free(h->file));
	assert_null(pinbroker_unref(h->pb));
	close(h->context_fd);
}

int holding_dispatch(struct holding *h)
{
	struct pollfd pfd = {.fd = pinbroker_get_fd(h->pb), .events = POLLIN};

	assert_int_equal(poll(&pfd, 1, WAIT_MSEC), 1);
	return pinbroker_dispatch(h->pb);
}

void holding_see_truncate(struct holding *h)
{
	struct result result;
	pid_t pid;
	int fd;

	pid = truncate_start(&fd);
	while (!h->seen.let_go)
		must(h->pb, holding_dispatch(h));
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	/* Who it was may have been known from the start. */
	assert_int_equal(h->seen.n, 1 + h->seen.n_updates);
	assert_in_range(h->seen.n_updates, 0, 1);
}

unsigned count_descriptors(void)
{
	DIR *d = opendir("/proc/self/fd");
	unsigned n = 0;

	assert_non_null(d);
	while (readdir(d))
		n++;
	closedir(d);
	return n;
}
