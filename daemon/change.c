/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "change.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "broker.h"
#include "log.h"
#include "macro.h"

/* mincore() for so many pages is faster than another thread. */
#define AT_ONCE_PAGES  4096
#define AT_ONCE_RANGES 64

#define CHUNK_PAGES 4096

/* A search is followed by a pause of so many times its length, and of a second if nothing shows that the file has
 * lost any pages. */
#define PAUSE_TIMES 50
#define PAUSE_USEC  (1 * USEC_PER_SEC)

static bool look(const struct file *file, struct stat *ret)
{
	return file->lease.fd >= 0 && file->backing.kind != BACKING_DEVICE_DAX &&
	       fstat(file->lease.fd, ret) >= 0;
}

static void note(struct change *change, const struct stat *st)
{
	change->size = (uint64_t)st->st_size;
	change->blocks = (uint64_t)st->st_blocks;
	change->modified = st->st_mtim;
	change->known = true;
	/* what has grown can shrink once more */
	if (change->size > change->emergency_size)
		change->emergency_size = UINT64_MAX;
}

void change_begin(struct file *file, uint64_t end)
{
	struct stat st;

	if (end > file->change.emergency_size)
		file->change.emergency_size = UINT64_MAX;
	if (file->n_pins == 1 && look(file, &st))
		note(&file->change, &st);
}

static const char *circumstance(const struct file *file)
{
	return file->unguarded ? "while it was exposed" : "past its lease";
}

static size_t count_pinning(struct pin **pins, size_t n_pins)
{
	size_t n = 0;

	for (size_t i = 0; i < n_pins; i++)
		n += !pins[i]->on_demand;
	return n;
}

static int revoke_pins(struct file *file, const struct conflict *conflict, struct pin **pins, size_t n_pins)
{
	struct selection selection;
	int r;

	r = selection_of_these(file->broker, pins, n_pins, &selection);
	if (r >= 0)
		r = revocation_start(file->broker, file, false, conflict, &selection, 0, true, NULL);
	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot revoke the pins of %s", file->path);
	return r;
}

/* ---- The file has become shorter ---- */

/* resumed: the run before may have told holders already that have no pages to let go of */
static void check_size(struct file *file, uint64_t size, bool resumed)
{
	_cleanup_(freep) struct pin **pins = NULL;
	struct log_fields fields = { .file = file->id, .path = file->path };
	struct conflict conflict = conflict_new(CAUSE_SHRINK);
	struct pin *pin = NULL;
	size_t n = 0, n_pinning;

	if (size >= pin_ranges_end(&file->pins) || size >= file->change.emergency_size)
		return;
	pins = calloc(file->n_pins, sizeof(*pins));
	if (!pins)
		return; /* the next look comes by here again */
	while ((pin = pin_ranges_find(&file->pins, size, UINT64_MAX, pin))) {
		pin->torn = true;
		if (!resumed || !pin->on_demand || (file->unguarded && pin->revocation == 0))
			pins[n++] = pin;
	}
	file->change.emergency_size = size;
	if (n == 0)
		return;
	conflict.offset = size;
	conflict.size = (int64_t)size;
	n_pinning = count_pinning(pins, n);
	if (n_pinning > 0)
		log_event(LOG_CRIT, MESSAGE_LEASE_LOST, &fields,
			  "%s was truncated to %" PRIu64 " bytes %s, under %zu pins: they are revoked by "
			  "force.",
			  file->path, size, circumstance(file), n_pinning);
	if (revoke_pins(file, &conflict, pins, n) < 0)
		file->change.emergency_size = UINT64_MAX;
}

/* ---- Pages are not in it any more ---- */

struct range {
	uint64_t pin, offset, length;
	bool gone; /* out: in part */
};

struct search {
	struct job job;
	struct broker *broker;
	uint64_t file;
	int fd; /* owned; a dup */
	bool lost_some;
	uint64_t allocated; /* of hugetlbfs, whose pages mincore() knows only where they are mapped: the bytes that
			     * the file has in all; else UINT64_MAX */
	uint64_t took_usec; /* out */
	size_t n;
	struct range ranges[];
};

/* A pinned page cannot be swapped out or dropped: where it is not in memory it is not the file's any more. */
static bool is_whole(int fd, uint64_t offset, uint64_t length)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), end = offset + length;
	unsigned char here[CHUNK_PAGES];

	for (uint64_t from = offset / page * page; from < end; from += CHUNK_PAGES * page) {
		size_t size = end - from < CHUNK_PAGES * page ? end - from : CHUNK_PAGES * page;
		void *p = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, (off_t)from);
		int r;

		if (p == MAP_FAILED)
			return true; /* not known */
		r = mincore(p, size, here);
		munmap(p, size);
		for (size_t i = 0; r >= 0 && i < (size + page - 1) / page; i++)
			if (!(here[i] & 1))
				return false;
	}
	return true;
}

/* In the order of their offsets. */
static uint64_t count_pinned(const struct search *s)
{
	uint64_t n = 0, end = 0;

	for (size_t i = 0; i < s->n; i++) {
		uint64_t from = s->ranges[i].offset, to = from + s->ranges[i].length;

		from = from > end ? from : end;
		if (to <= from)
			continue;
		n += to - from;
		end = to;
	}
	return n;
}

/* mincore() answers those who own the file or may write it; others it tells that everything is there. */
static void look_for_pages(struct search *s)
{
	struct stat st;

	if (fstat(s->fd, &st) < 0)
		return;
	(void)setfsuid(st.st_uid);
	for (size_t i = 0; i < s->n; i++)
		s->ranges[i].gone = !is_whole(s->fd, s->ranges[i].offset, s->ranges[i].length);
	(void)setfsuid(geteuid());
}

static void search_run(struct job *job)
{
	struct search *s = container_of(job, struct search, job);
	uint64_t begin = now_usec();

	if (s->allocated == UINT64_MAX)
		look_for_pages(s);
	else if (count_pinned(s) > s->allocated)
		for (size_t i = 0; i < s->n; i++)
			s->ranges[i].gone = true;
	s->fd = safe_close(s->fd);
	s->took_usec = now_usec() - begin;
}

static void revoke_gone(struct file *file, const struct search *s)
{
	_cleanup_(freep) struct pin **pins = calloc(s->n + 1, sizeof(*pins));
	struct log_fields fields = { .file = file->id, .path = file->path };
	struct conflict conflict = conflict_new(CAUSE_SHRINK);
	uint64_t end = 0;
	size_t n = 0;

	for (size_t i = 0; i < s->n && pins; i++) {
		const struct range *range = &s->ranges[i];
		struct pin *pin = range->gone ? broker_find_pin(file->broker, range->pin) : NULL;

		if (!pin || pin->over || pin->torn || pin->state == PIN_LEAVING)
			continue;
		pin->torn = true;
		if (n == 0 || pin->offset < conflict.offset)
			conflict.offset = pin->offset;
		if (pin_end_offset(pin) > end)
			end = pin_end_offset(pin);
		pins[n++] = pin;
	}
	if (n == 0)
		return;
	conflict.length = end - conflict.offset;
	log_event(LOG_CRIT, MESSAGE_LEASE_LOST, &fields,
		  "Pages were taken from %s %s, under %zu pins: they are revoked by force.", file->path,
		  circumstance(file), n);
	(void)revoke_pins(file, &conflict, pins, n);
}

static void search_later(struct file *file);

static void search_done(struct job *job)
{
	struct search *s = container_of(job, struct search, job);
	struct file *file = broker_find_file(s->broker, s->file);

	safe_close(s->fd);
	if (file) {
		file->change.searching = false;
		file->change.search_usec = now_usec() + PAUSE_TIMES * s->took_usec;
		if (!s->lost_some)
			file->change.search_usec += PAUSE_USEC;
		revoke_gone(file, s);
	}
	free(s);
	/* what has happened meanwhile */
	if (file && (file->change.lost_some || file->change.written))
		search_later(file);
}

/*
 * Pages of a pin that is not bound, or of an unknown kind of context, need not be in memory: that they are missing
 * says something only where the file has lost some, and has none elsewhere.
 */
static bool is_to_be_whole(const struct pin *pin, bool lost_some)
{
	if (pin->on_demand || pin->torn || pin->destroyed || pin->state == PIN_LEAVING)
		return false;
	if (pin->use->file->backing.kind == BACKING_HUGETLBFS)
		return pin->state == PIN_BOUND;
	return (lost_some && pin->use->file->backing.kind == BACKING_TMPFS) ||
	       (pin->state == PIN_BOUND && pin->context->ops != &context_opaque);
}

static struct search *search_new(struct file *file, uint64_t *ret_bytes)
{
	struct search *s = calloc(1, sizeof(*s) + file->n_pins * sizeof(struct range));
	struct pin *pin = NULL;

	*ret_bytes = 0;
	if (!s || (s->fd = fcntl(file->lease.fd, F_DUPFD_CLOEXEC, 3)) < 0) {
		free(s);
		return NULL;
	}
	s->broker = file->broker;
	s->file = file->id;
	s->lost_some = file->change.lost_some;
	s->allocated = file->backing.kind == BACKING_HUGETLBFS ? file->change.blocks * 512 : UINT64_MAX;
	while ((pin = pin_ranges_find(&file->pins, 0, UINT64_MAX, pin)))
		if (is_to_be_whole(pin, s->lost_some)) {
			s->ranges[s->n++] = (struct range){ pin->id, pin->offset, pin->length, false };
			*ret_bytes += pin->length;
		}
	return s;
}

static void search_pages(struct file *file)
{
	uint64_t bytes, page = (uint64_t)sysconf(_SC_PAGESIZE);
	struct search *s = search_new(file, &bytes);

	if (!s) {
		search_later(file);
		return;
	}
	file->change.lost_some = file->change.written = false;
	file->change.searching = true;
	s->job.run = search_run;
	s->job.done = search_done;
	if (bytes / page <= AT_ONCE_PAGES && s->n <= AT_ONCE_RANGES) {
		search_run(&s->job);
		search_done(&s->job);
	} else {
		offload_submit_force(file->broker->offload, NULL, &s->job);
	}
}

static int on_timer(sd_event_source *source, uint64_t usec, void *userdata)
{
	change_check(userdata);
	return 0;
}

/* Without a timer the audit comes by. */
static void search_later(struct file *file)
{
	struct change *change = &file->change;
	uint64_t usec = change->search_usec;

	if (usec < now_usec())
		usec = now_usec() + PAUSE_USEC / 10;
	if (change->timer) {
		(void)sd_event_source_set_time(change->timer, usec);
		(void)sd_event_source_set_enabled(change->timer, SD_EVENT_ONESHOT);
	} else {
		(void)sd_event_add_time(file->broker->event, &change->timer, CLOCK_MONOTONIC, usec, 1,
					on_timer, file);
	}
}

void change_check(struct file *file)
{
	struct change *change = &file->change;
	const struct change before = *change;
	struct stat st;

	if (file->n_pins == 0 || file->opening || !look(file, &st))
		return;
	note(change, &st);
	change->resumed = false;
	check_size(file, change->size, before.resumed);
	if (!before.known)
		return;
	change->lost_some |= change->blocks < before.blocks || change->size < before.size;
	/* Holders write what is held for writing. Otherwise it was somebody else. */
	change->written |= (file->lease.access == ACCESS_READ || file->exposed) &&
			   memcmp(&change->modified, &before.modified, sizeof(change->modified)) != 0;
	if (change->searching || !(change->lost_some || change->written))
		return;
	if (now_usec() < change->search_usec)
		search_later(file);
	else
		search_pages(file);
}

/* No descriptor of a holder is closed for good: the broker has the same. So it was somebody else's, who opened it
 * for writing while no lease was in the way. */
static void revoke_late(struct file *file)
{
	_cleanup_(freep) struct pin **pins = calloc(file->n_pins + 1, sizeof(*pins));
	struct log_fields fields = { .file = file->id, .path = file->path };
	struct conflict conflict = conflict_new(CAUSE_MODIFY);
	struct selection selection;
	struct pin *pin = NULL;
	size_t n = 0;
	int r = -ENOMEM;

	while (pins && (pin = pin_ranges_find(&file->pins, 0, UINT64_MAX, pin)))
		if (LIST_EMPTY(&pin->targets))
			pins[n++] = pin;
	if (pins && n == 0)
		return;
	log_event(LOG_WARNING, MESSAGE_LEASE_BROKEN, &fields,
		  "%s was opened for writing and changed while it was exposed, under %zu pins.", file->path,
		  count_pinning(pins, n));
	if (pins)
		r = selection_of_these(file->broker, pins, n, &selection);
	if (r >= 0)
		r = revocation_start(file->broker, file, false, &conflict, &selection, UINT64_MAX, false,
				     NULL);
	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot revoke the pins of %s", file->path);
}

void change_event(struct file *file, uint32_t mask)
{
	file->change.touched |= file->exposed && mask & IN_MODIFY;
	if (!(mask & IN_CLOSE_WRITE) || !file->change.touched || file->n_pins == 0)
		return;
	file->change.touched = false;
	revoke_late(file);
}

void change_clear(struct change *change)
{
	change->timer = sd_event_source_disable_unref(change->timer);
}
