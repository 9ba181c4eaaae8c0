/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <systemd/sd-event.h>

#include "daemon/core/admin.h"
#include "daemon/core/broker.h"
#include "daemon/manager/notify.h"
#include "daemon/varlink/server.h"
#include "fake-kernel.h"
#include "fuzz.h"
#include "protocol/connection.h"
#include "protocol/macro.h"

/* clang-format off */
/*
 * The daemon from its sockets down to where the kernel begins (fake-kernel.h). The input is a row of lines.
 * What a client sends:
 *
 *     a…c[DESCRIPTORS] TEXT   on this connection, with a NUL behind it; descriptors are a letter each, of
 *                             kernel_descriptor()
 *     A…C[DESCRIPTORS] TEXT   the same without the NUL
 *     -a +a1                  disconnects; connects, as this process
 *     /a                      reads nothing on it any more, or again
 *
 * And what happens, to a process, file or object by its number:
 *
 *     k0 l0 L0 s0      a process is killed, closes its contexts, has them, becomes another user
 *     <0 >0 =0 ~0 e0   a file is opened for writing, for reading; its lease is gone, was given up; it is closed
 *     !01              somebody (1) has done something to the shared lease
 *     #0 %0 _0         it is truncated, written to, has a hole
 *     t500             so many milliseconds pass
 *     j j0 j1 j2 j3    jobs are run at once; are left waiting; one is run; one comes back, the first or the last
 *                      that was run
 *     h0…h9            the answer to one question changes
 *     r?5              an administrator's word, see order()
 *     y1               it is found out that this process breaks the leases
 *     z500             a look at the clock takes so many microseconds
 *     g0…g3            another configuration
 *     q x              the end, with everything let go, or at once
 */
/* clang-format on */

#define LINES_MAX       1000
#define TURNS_MAX       20000
#define DESCRIPTORS_MAX 128

struct link {
	int fd; /* -1: none */
	size_t process;
	bool unread;
};

static struct {
	sd_event *event;
	struct broker *broker;
	struct rpc *rpc;
	struct notifier notifier;
	struct link links[3];
	bool jobs_wait, abrupt, on_demand;
} f;

/* ---- Connections ---- */

static void connect_link(struct link *link, size_t process)
{
	int fds[2];

	if (link->fd >= 0)
		return;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) < 0)
		abort();
	link->fd = fds[1];
	link->process = process;
	link->unread = false;
	kernel_connect(fds[0], &kernel.processes[process]);
}

static void disconnect_link(struct link *link)
{
	link->fd = safe_close(link->fd);
}

/* True if there was anything. */
static bool read_link(struct link *link)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(253 * sizeof(int))];
	static char bytes[65536];
	struct iovec iov = {bytes, sizeof(bytes)};
	struct msghdr mh = {.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = sizeof(control)};
	ssize_t n;

	if (link->fd < 0 || link->unread)
		return false;
	n = recvmsg(link->fd, &mh, MSG_CMSG_CLOEXEC);
	if (n <= 0) {
		if (n == 0 || errno != EAGAIN)
			disconnect_link(link);
		return false;
	}
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&mh); c; c = CMSG_NXTHDR(&mh, c))
		for (size_t i = 0; i < (c->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++)
			close(((int *)CMSG_DATA(c))[i]);
	return true;
}

static void send_text(struct link *link, const char *kinds, size_t n_kinds, char *text, size_t n)
{
	union {
		char bytes[CMSG_SPACE((CONNECTION_FDS_MAX + 1) * sizeof(int))];
		struct cmsghdr header;
	} control = {};
	struct iovec iov = {text, n};
	struct msghdr mh = {.msg_iov = &iov, .msg_iovlen = 1};
	int *fds = (int *)CMSG_DATA(&control.header);
	size_t n_fds = 0;

	for (size_t i = 0; i < n_kinds && n_fds <= CONNECTION_FDS_MAX; i++) {
		int fd = kernel_descriptor(kinds[i]);

		if (fd >= 0)
			fds[n_fds++] = fd;
	}
	if (n_fds > 0) {
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(n_fds * sizeof(int));
		mh.msg_control = &control;
		mh.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
	}
	/* what does not fit is lost */
	(void)sendmsg(link->fd, &mh, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (n_fds > 0)
		close(fds[--n_fds]);
}

/* ---- The loop ---- */

static bool run_job(void)
{
	struct offload *o = f.broker->offload;

	return offload_finish_next(o) || offload_run_next(o);
}

/* A holder that is not told what was destroyed under a pin deregisters what is another's by then. */
static void check_destroyed(void)
{
	for (size_t i = 0; i < kernel.n_destroyed; i++) {
		const struct handle *h = &kernel.destroyed[i];
		const struct pin *pin = broker_find_pin(f.broker, h->pin);

		if (pin && !pin->over && pin->handle == h->handle && (h->gone || !pin->destroyed))
			abort();
	}
}

/* One whose pins are of one file names it, however long they took to be found. Of those on demand it does not count
 * how many it has found. */
static void check_named(void)
{
	struct revocation *rev;

	for (uint64_t after = 0; (rev = broker_next_revocation(f.broker, after)); after = rev->id) {
		const struct target *target = target_next(rev, (struct place){});

		if (!revocation_is_running(rev) || rev->finding || rev->announcing || f.on_demand ||
			rev->n_pinning != 1 || rev->n_remaining != 1)
			continue;
		if (!rev->path || rev->file != target->pin->use->file->id)
			abort();
	}
}

/* Until nobody has anything to do any more, which is to be soon. */
static void run(void)
{
	unsigned n = 0;
	bool more;

	do {
		int r = sd_event_run(f.event, 0);

		if (r < 0 || n++ > TURNS_MAX)
			abort();
		more = r > 0;
		for (size_t i = 0; i < ELEMENTS(f.links); i++)
			more |= read_link(&f.links[i]);
		if (!f.jobs_wait)
			more |= run_job();
		if (!kernel.manager_hangs)
			manager_answer(f.broker);
		if (!kernel.bus_hangs)
			bus_answer(f.broker);
	} while (more);
	if (offload_unfinished(f.broker->offload) == 0)
		check_destroyed();
	check_named();
}

/* ---- Events ---- */

static struct file *find_file(size_t i)
{
	struct inode_key key = {makedev(8, 1), kernel.files[i].inode};

	return broker_find_inode(f.broker, key);
}

static void touch(size_t i, uint32_t mask)
{
	struct file *file = find_file(i);

	if (file)
		file_touched(file, mask);
}

static void break_lease(size_t i, enum lease_event event)
{
	struct file *file = find_file(i);

	if (event == LEASE_WRITER || event == LEASE_READER)
		kernel_open(&kernel.files[i], event == LEASE_WRITER);
	else
		kernel.files[i].event = event;
	if (file)
		file_update(file);
}

static void tamper(size_t i, uint64_t who)
{
	struct file *file = find_file(i);

	kernel.files[i].tampering = (enum lease_tampering)(LEASE_RESIGNALLED + who % 4);
	kernel.files[i].culprit = kernel.processes[who % N_PROCESSES].uid;
	if (file)
		sharing_look(file);
}

static void change(size_t i, char what)
{
	int fd = kernel.files[i].fd, r = 0;

	if (what == '#')
		r = ftruncate(fd, 4096);
	else if (what == '%')
		r = pwrite(fd, "", 1, 0) == 1 ? 0 : -1;
	else
		r = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096);
	if (r < 0)
		abort();
	touch(i, IN_MODIFY);
}

static void blame(struct fake_process *p)
{
	struct conflict conflict = conflict_new(CAUSE_TRUNCATE);
	struct revocation *rev;

	conflict.pid = p->pid;
	conflict.uid = p->uid;
	for (uint64_t after = 0; (rev = broker_next_revocation(f.broker, after));) {
		after = rev->id;
		if (rev->by_break)
			revocation_blame(rev, &conflict, &p->pid, 1);
	}
}

static void order(char what, uint64_t n)
{
	const struct inode_key now = {makedev(8, 1), kernel.files[n % N_FILES].inode};
	const uint64_t pins[] = {n}, others[] = {20};
	const struct mounts mounts = {makedev(8, 1), others, n % 2};
	struct broker *b = f.broker;
	struct refusal refusal;
	char path[] = "/data/0";
	uint64_t id;

	path[6] = (char)('0' + n % N_FILES);
	switch (what) {
	case 'p':
		(void)admin_revoke_pins(b, pins, ELEMENTS(pins), "so", n, &id, &refusal);
		break;
	case 'f':
		(void)admin_revoke_file(b, n, "", 0, &id, &refusal);
		break;
	case 'c':
		(void)admin_revoke_client(b, n, "so", UINT64_MAX, &id, &refusal);
		break;
	case 'i':
		(void)admin_revoke_inode(b, now.device, now.inode, "", 1, &id, &refusal);
		break;
	case 'n':
		(void)admin_revoke_path(b, path, n % 8 < 4 ? &now : NULL, "", 0, &id, &refusal);
		break;
	case 'm':
		(void)admin_revoke_mount(b, "/data", "", 0, &id, &refusal);
		break;
	case 'M':
		(void)admin_revoke_mounts(b, &mounts, "", 0, &id, &refusal);
		break;
	case 'd':
		(void)admin_revoke_device(b, n % 2 ? "dax0.0" : "mlx5_0", "", 0, &id, &refusal);
		break;
	case 'D':
		admin_remove_device(b, makedev(231, 192));
		break;
	}
}

static void change_answer(uint64_t n)
{
	bool *const answers[] = {&kernel.cannot_search, &kernel.cannot_stop, &kernel.detach_fails,
		&kernel.detach_unproved, &kernel.handles_stay, &kernel.manager_hangs,
		&kernel.bus_hangs};

	if (n < ELEMENTS(answers))
		*answers[n] = !*answers[n];
	else if (n == 7)
		kernel.bus_answer = kernel.bus_answer == 0 ? REFUSED : 0;
	else if (n == 8)
		kernel.bus_answer = -EIO;
	else if (n == 9)
		kernel.break_usec = kernel.break_usec == USEC_INFINITY ? USEC_PER_SEC
								       : USEC_INFINITY;
}

/* ---- Configuration ---- */

static struct config *make_config(uint64_t n)
{
	static const uint64_t limits[LIMIT_COUNT] = {
		[LIMIT_CLIENTS] = 8,
		[LIMIT_FILES] = 6,
		[LIMIT_CONTEXTS] = 6,
		[LIMIT_PINS] = 40,
		[LIMIT_PINNED_BYTES] = 1024 * 1024,
		[LIMIT_UNFINISHED] = 8,
		[LIMIT_DESCRIPTORS] = 600,
		[LIMIT_QUEUED_BYTES] = 256 * 1024,
	};
	struct config *config = calloc(1, sizeof(*config));

	if (!config)
		abort();
	config->n_refs = 1;
	config->revoke_grace_usec = 10 * USEC_PER_SEC;
	config->signal_on_timeout = n == 1 ? 0 : SIGBUS;
	config->signal_grace_usec = 5 * USEC_PER_SEC;
	config->force_unmap = n == 2;
	config->readers = n == 3 ? READERS_ADMIT : READERS_WAIT;
	config->require_open_descriptor = n == 2;
	for (size_t i = 0; i < LIMIT_COUNT; i++)
		config->limits[i] = n == 1 ? limits[i] / 4 : limits[i];
	return config;
}

/* ---- One line ---- */

static void run_some_jobs(char what)
{
	f.jobs_wait = what >= '0' && what <= '3';
	if (what == '1')
		(void)offload_run_next(f.broker->offload);
	else if (what == '2')
		(void)offload_finish_next(f.broker->offload);
	else if (what == '3')
		(void)offload_finish_last(f.broker->offload);
}

static void do_to_process(char what, struct fake_process *p)
{
	switch (what) {
	case 'k':
		kernel_kill(p);
		break;
	case 'l':
	case 'L':
		p->holds = what == 'L';
		break;
	case 's':
		p->changed = !p->changed;
		break;
	case 'y':
		blame(p);
		break;
	}
}

static void do_to_file(char what, size_t i, uint64_t more)
{
	switch (what) {
	case '<':
		break_lease(i, LEASE_WRITER);
		break;
	case '>':
		break_lease(i, LEASE_READER);
		break;
	case '=':
		break_lease(i, LEASE_GONE);
		break;
	case '~':
		break_lease(i, LEASE_STRIPPED);
		break;
	case 'e':
		kernel.files[i].elsewhere = false;
		touch(i, IN_CLOSE);
		break;
	case '!':
		tamper(i, more);
		break;
	case '#':
	case '%':
	case '_':
		change(i, what);
		break;
	}
}

static void do_to_all(char what, const char *rest, uint64_t n)
{
	switch (what) {
	case 't':
		kernel_pass_time(n % 1000000 * USEC_PER_MSEC);
		break;
	case 'j':
		run_some_jobs(rest[0]);
		break;
	case 'h':
		change_answer(n);
		break;
	case 'r':
		order(rest[0], rest[0] ? strtoull(rest + 1, NULL, 10) : 0);
		break;
	case 'z':
		kernel.tick_usec = n % 501; /* a slice has room for a step */
		break;
	case 'g':
		broker_set_config(f.broker, make_config(n));
		break;
	case 'q':
		if (!f.broker->stopping)
			broker_stop(f.broker, NULL, NULL);
		break;
	case 'x':
		f.abrupt = true;
		break;
	}
}

/* In the place of the newline there is a NUL, which goes with it where it is to. */
static void send_line(struct link *link, char *line, size_t size, bool whole)
{
	char *text = memchr(line, ' ', size);
	size_t n_kinds = text ? (size_t)(text - line) : 0;

	text = text ? text + 1 : line;
	if (link->fd < 0)
		connect_link(link, (size_t)(link - f.links) % 2);
	run(); /* it is to be accepted as who it is */
	size -= (size_t)(text - line);
	if (link->fd >= 0 && size + whole > 0)
		send_text(link, line, n_kinds, text, size + whole);
}

static void do_line(char *line, size_t size)
{
	char what = line[0], *rest = line + 1;
	size_t digit = size > 1 ? (size_t)(rest[0] - '0') : 0;
	struct link *link = size > 1 && rest[0] >= 'a' && rest[0] <= 'c' ? &f.links[rest[0] - 'a']
									 : NULL;
	bool second = size > 2;

	if (size == 0)
		return;
	if (what >= 'a' && what <= 'c')
		send_line(&f.links[what - 'a'], rest, size - 1, true);
	else if (what >= 'A' && what <= 'C')
		send_line(&f.links[what - 'A'], rest, size - 1, false);
	else if (what == '-' && link)
		disconnect_link(link);
	else if (what == '+' && link)
		connect_link(link, second ? (size_t)rest[1] % N_PROCESSES : 0);
	else if (what == '/' && link)
		link->unread = !link->unread;
	else if (strchr("klLsy", what))
		do_to_process(what, &kernel.processes[digit % N_PROCESSES]);
	else if (strchr("<>=~e!#%_", what))
		do_to_file(what, digit % N_FILES, second ? (uint64_t)rest[1] : 0);
	else
		do_to_all(what, rest, strtoull(rest, NULL, 10));
}

/* ---- One input ---- */

static void start(void)
{
	kernel_start();
	f.jobs_wait = f.abrupt = false;
	f.notifier = (struct notifier)NOTIFIER_NULL;
	TAILQ_INIT(&f.notifier.waiters);
	for (size_t i = 0; i < ELEMENTS(f.links); i++)
		f.links[i].fd = -1;
	if (sd_event_new(&f.event) < 0 || broker_new(f.event, make_config(0), &f.broker) < 0 ||
		rpc_new(f.broker, &f.rpc) < 0 ||
		rpc_listen(f.rpc, kernel_listen()) < 0)
		abort();
	f.broker->ids.fd = -1;
	f.broker->store.notifier = &f.notifier;
	bus_begin(f.broker);
}

/* Everybody dies, whatever was withheld goes on: nothing is left then. */
static void let_go(void)
{
	struct broker *b = f.broker;

	f.jobs_wait = false;
	kernel.tick_usec = 0;
	kernel.cannot_search = kernel.handles_stay = kernel.manager_hangs = kernel.bus_hangs =
		false;
	for (size_t i = 0; i < ELEMENTS(f.links); i++)
		disconnect_link(&f.links[i]);
	for (size_t i = 0; i < N_PROCESSES; i++)
		kernel_kill(&kernel.processes[i]);
	for (size_t i = 0; i < N_FILES; i++)
		kernel.files[i].elsewhere = false;
	run();
	for (unsigned i = 0; i < 20; i++) {
		kernel_pass_time(5 * USEC_PER_SEC);
		run();
	}
	if (b->n_clients > 0 || b->n_files > 0 || b->n_pins > 0 || b->n_running > 0 ||
		!RB_EMPTY(&b->contexts) || !RB_EMPTY(&b->pins) ||
		offload_unfinished(b->offload) > 0)
		abort();
}

static void stop(void)
{
	f.rpc = rpc_free(f.rpc);
	kernel_close_backlog();
	bus_end(f.broker);
	broker_free(f.broker); /* sees that no user is charged anything */
	sd_event_unref(f.event);
	for (size_t i = 0; i < ELEMENTS(f.links); i++)
		disconnect_link(&f.links[i]);
	kernel_stop();
}

static unsigned count_descriptors(void)
{
	unsigned n = 0;

	for (int fd = 0; fd < DESCRIPTORS_MAX; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	return n;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char *text = malloc(size + 1), *line = text, *end;
	unsigned n_descriptors = count_descriptors();

	if (!text)
		return 0;
	memcpy(text, data, size);
	text[size] = 0;
	f.on_demand = memmem(data, size, "onDemand", strlen("onDemand"));
	start();
	for (unsigned n = 0; n < LINES_MAX && line <= text + size; n++) {
		end = memchr(line, '\n', (size_t)(text + size - line));
		if (!end)
			end = text + size;
		*end = 0;
		do_line(line, (size_t)(end - line));
		run();
		line = end + 1;
	}
	if (!f.abrupt)
		let_go();
	stop();
	free(text);
	if (count_descriptors() != n_descriptors)
		abort();
	return 0;
}
