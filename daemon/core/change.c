/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/change.h"

#include <fcntl.h>
#include <inttypes.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "daemon/core/broker.h"
#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "protocol/macro.h"

/* mincore() for so many pages is faster than another thread. */
#define AT_ONCE_PAGES  4096
#define AT_ONCE_RANGES 64

#define CHUNK_PAGES  4096
#define BLOCK_RANGES 1024
#define EXTENTS      32 /* at a time */

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

static int revoke_pins(struct file *file, const struct conflict *conflict, struct selection *selection)
{
	int r = revocation_start(file->broker, file, false, conflict, selection, 0, true, NULL);

	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot revoke the pins of %s", file->path);
	return r;
}

static void go_on(struct file *file);

/* ---- The file has become shorter ---- */

/* resumed: the run before may have told holders already that have no pages to let go of */
static void check_size(struct file *file, uint64_t size, bool resumed)
{
	struct change *change = &file->change;

	if (size >= pin_ranges_end(&file->pins) || size >= change->emergency_size)
		return;
	change->emergency_size = size;
	/* What was beyond an end that has not been dealt with yet is not forgotten. */
	if (change->cut && change->beyond.start < size)
		size = change->beyond.start;
	change->beyond = selection_of_file(file, size);
	change->beyond.pinning = resumed && !file->unguarded;
	change->beyond.untold = resumed;
	change->n_beyond = change->n_pinning = 0;
	change->cut = true;
	go_on(file);
}

/* Marks pins beyond the end; true: there are more. */
static bool mark_some(struct change *change, const struct slice *slice)
{
	struct pin *pin;

	while (selection_next(&change->beyond, &pin) > 0) {
		if (pin) {
			pin->torn = true;
			change->n_beyond++;
			change->n_pinning += !pin->on_demand;
		}
		if (slice_is_over(slice))
			return true;
	}
	return false;
}

static void revoke_beyond(struct file *file)
{
	struct change *change = &file->change;
	struct log_fields fields = { .file = file->id, .path = file->path };
	struct conflict conflict = conflict_new(CAUSE_SHRINK);
	struct selection selection = change->beyond;

	change->cut = false;
	if (change->n_beyond == 0)
		return;
	selection.after = selection.after_offset = 0;
	conflict.offset = selection.start;
	conflict.size = (int64_t)selection.start;
	if (change->n_pinning > 0)
		log_event(LOG_CRIT, MESSAGE_LEASE_LOST, &fields,
			  "%s was truncated to %" PRIu64 " byte%s %s, under %zu pin%s: they are revoked by "
			  "force.",
			  file->path, selection.start, PLURAL(selection.start), circumstance(file),
			  change->n_pinning, PLURAL(change->n_pinning));
	if (revoke_pins(file, &conflict, &selection) < 0)
		change->emergency_size = UINT64_MAX; /* the next look comes by here again */
}

/* ---- Pages are not in it any more ---- */

struct range {
	uint64_t pin, offset, length;
	bool cached; /* its pages may be on the disk alone */
	bool gone;   /* out: in part */
};

/* Lists the pins to look for, looks, and goes through the list again. */
struct page_search {
	struct job job;
	struct broker *broker;
	uint64_t file;
	int fd; /* owned; a dup */
	enum {
		STEP_LISTS,
		STEP_LOOKS, /* job */
		STEP_JUDGES,
	} step;
	bool lost_some;
	bool cached; /* of any range */
	bool no_memory; /* for all */
	uint64_t allocated; /* of hugetlbfs, whose pages mincore() knows only where they are mapped: the bytes that
			     * the file has in all; else UINT64_MAX */
	uint64_t took_usec; /* out */
	struct selection left; /* STEP_LISTS: the pins that are yet to come */
	uint64_t n_bytes;
	uint64_t *torn; /* owned; the pins that have lost pages, between start and end */
	size_t n_torn;
	uint64_t start, end;
	size_t i; /* STEP_JUDGES: the next range */
	size_t n, n_max;
	struct range *blocks[]; /* owned; of BLOCK_RANGES each: to touch the memory for all would be a long turn */
};

static struct range *range_at(const struct page_search *s, size_t i)
{
	return &s->blocks[i / BLOCK_RANGES][i % BLOCK_RANGES];
}

static bool range_add(struct page_search *s, const struct range *range)
{
	struct range **block = &s->blocks[s->n / BLOCK_RANGES];

	if (!*block && !(*block = malloc(BLOCK_RANGES * sizeof(**block))))
		return false;
	*range_at(s, s->n++) = *range;
	s->n_bytes += range->length;
	s->cached |= range->cached;
	return true;
}

static void page_search_free(struct page_search *s)
{
	for (size_t i = 0; i < s->n; i += BLOCK_RANGES)
		free(s->blocks[i / BLOCK_RANGES]);
	safe_close(s->fd);
	free(s->torn);
	free(s);
}

/* Is anything of it nowhere on the disk, nor to be written there? Without an answer: no. */
static bool has_hole(int fd, uint64_t from, uint64_t to)
{
	union {
		struct fiemap map;
		char size[sizeof(struct fiemap) + EXTENTS * sizeof(struct fiemap_extent)];
	} m;

	while (from < to) {
		m.map = (struct fiemap){
			.fm_start = from, .fm_length = to - from, .fm_extent_count = EXTENTS};
		if (ioctl(fd, FS_IOC_FIEMAP, &m) < 0)
			return false;
		for (unsigned i = 0; i < m.map.fm_mapped_extents; i++) {
			const struct fiemap_extent *extent = &m.map.fm_extents[i];

			if (extent->fe_logical > from)
				return true;
			from = extent->fe_logical + extent->fe_length;
		}
		if (m.map.fm_mapped_extents < EXTENTS)
			return from < to;
	}
	return false;
}

/* Of n pages from an offset on. */
static bool are_there(int fd, const struct range *range, uint64_t from, const unsigned char *here, size_t n)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);

	for (size_t i = 0, k; i < n; i = k + 1) {
		for (k = i; k < n && !(here[k] & 1); k++)
			;
		if (k > i && (!range->cached || has_hole(fd, from + i * page, from + k * page)))
			return false;
	}
	return true;
}

/* A pinned page cannot be swapped out or dropped: where it is not in memory it is not the file's any more. */
static bool is_whole(int fd, const struct range *range)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), end = range->offset + range->length;
	unsigned char here[CHUNK_PAGES];

	for (uint64_t from = range->offset / page * page; from < end; from += CHUNK_PAGES * page) {
		size_t size = end - from < CHUNK_PAGES * page ? end - from : CHUNK_PAGES * page;
		void *p = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, (off_t)from);
		int r;

		if (p == MAP_FAILED)
			return true; /* not known */
		r = mincore(p, size, here);
		munmap(p, size);
		if (r >= 0 && !are_there(fd, range, from, here, (size + page - 1) / page))
			return false;
	}
	return true;
}

/* In the order of their offsets. */
static uint64_t count_pinned(const struct page_search *s)
{
	uint64_t n = 0, end = 0;

	for (size_t i = 0; i < s->n; i++) {
		const struct range *range = range_at(s, i);
		uint64_t from = range->offset, to = from + range->length;

		from = from > end ? from : end;
		if (to <= from)
			continue;
		n += to - from;
		end = to;
	}
	return n;
}

/* mincore() answers those who own the file or may write it; others it tells that everything is there. */
static void look_for_pages(struct page_search *s)
{
	struct stat st;

	if (fstat(s->fd, &st) < 0)
		return;
	(void)setfsuid(st.st_uid);
	for (size_t i = 0; i < s->n; i++)
		range_at(s, i)->gone = !is_whole(s->fd, range_at(s, i));
	(void)setfsuid(geteuid());
}

static void page_search_run(struct job *job)
{
	struct page_search *s = container_of(job, struct page_search, job);
	uint64_t begin = now_usec();

	if (s->allocated == UINT64_MAX)
		look_for_pages(s);
	else if (count_pinned(s) > s->allocated)
		for (size_t i = 0; i < s->n; i++)
			range_at(s, i)->gone = true;
	s->fd = safe_close(s->fd);
	s->took_usec = now_usec() - begin;
}

static void page_search_done(struct job *job)
{
	struct page_search *s = container_of(job, struct page_search, job);
	struct file *file = broker_find_file(s->broker, s->file);

	if (!file) {
		page_search_free(s);
		return;
	}
	s->step = STEP_JUDGES;
	go_on(file);
}

static void page_search_look(struct page_search *s)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);

	s->job.run = page_search_run;
	s->job.done = page_search_done;
	s->step = STEP_LOOKS;
	/* what asks the file system may wait for it */
	if (s->n_bytes / page > AT_ONCE_PAGES || s->n > AT_ONCE_RANGES || s->cached) {
		offload_submit_force(s->broker->offload, NULL, &s->job);
		return;
	}
	page_search_run(&s->job);
	s->step = STEP_JUDGES;
}

/*
 * Pages of a pin that is not bound, or of an unknown kind of context, need not be in memory: that they are nowhere
 * says something only where the file has lost some.
 */
static bool is_to_be_whole(const struct pin *pin, bool lost_some, bool *ret_cached)
{
	enum backing_kind kind = pin->use->file->backing.kind;
	bool pinning = pin->state == PIN_BOUND && pin->context->ops != &context_opaque;

	*ret_cached = !pinning && kind == BACKING_PAGE_CACHE;
	if (pin->on_demand || pin->torn || pin->destroyed || pin->state == PIN_LEAVING)
		return false;
	if (kind == BACKING_HUGETLBFS)
		return pin->state == PIN_BOUND;
	return pinning || (lost_some && (kind == BACKING_TMPFS || kind == BACKING_PAGE_CACHE));
}

/* True: there are more. What is pinned meanwhile has its pages. */
static bool list_some(struct page_search *s, const struct slice *slice)
{
	struct pin *pin;
	bool cached;

	while (!s->no_memory && selection_next(&s->left, &pin) > 0 && s->n < s->n_max) {
		if (pin && is_to_be_whole(pin, s->lost_some, &cached))
			s->no_memory = !range_add(
				s, &(struct range){ pin->id, pin->offset, pin->length, cached, false });
		if (slice_is_over(slice))
			return true;
	}
	return false;
}

static void judge(struct page_search *s, const struct range *range)
{
	struct pin *pin = range->gone ? broker_find_pin(s->broker, range->pin) : NULL;

	if (!pin || pin->over || pin->torn || pin->state == PIN_LEAVING)
		return;
	pin->torn = true;
	if (s->n_torn == 0 || pin->offset < s->start)
		s->start = pin->offset;
	if (pin_end_offset(pin) > s->end)
		s->end = pin_end_offset(pin);
	s->torn[s->n_torn++] = pin->id;
}

/* True: there are more. */
static bool judge_some(struct page_search *s, const struct slice *slice)
{
	if (!s->torn && !(s->torn = malloc((s->n + 1) * sizeof(*s->torn)))) {
		s->no_memory = true;
		return false;
	}
	while (s->i < s->n) {
		judge(s, range_at(s, s->i++));
		if (slice_is_over(slice))
			return true;
	}
	return false;
}

static void revoke_torn(struct file *file, const struct page_search *s)
{
	struct log_fields fields = { .file = file->id, .path = file->path };
	struct conflict conflict = conflict_new(CAUSE_SHRINK);
	struct selection selection;
	int r;

	if (s->n_torn == 0)
		return;
	conflict.offset = s->start;
	conflict.length = s->end - s->start;
	log_event(LOG_CRIT, MESSAGE_LEASE_LOST, &fields,
		  "Pages were taken from %s %s, under %zu pin%s: they are revoked by force.", file->path,
		  circumstance(file), s->n_torn, PLURAL(s->n_torn));
	r = selection_of_pins(file->broker, s->torn, s->n_torn, &selection);
	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot revoke the pins of %s", file->path);
	else
		(void)revoke_pins(file, &conflict, &selection);
}

static void search_later(struct file *file);

static void page_search_end(struct file *file)
{
	struct change *change = &file->change;
	struct page_search *s = TAKE_PTR(change->search);

	change->search_usec = now_usec() + PAUSE_TIMES * s->took_usec;
	if (!s->lost_some)
		change->search_usec += PAUSE_USEC;
	change->lost_some |= s->no_memory;
	/* what has happened meanwhile */
	if (change->lost_some || change->written)
		search_later(file);
	revoke_torn(file, s);
	page_search_free(s);
}

static struct page_search *page_search_new(struct file *file)
{
	size_t n_blocks = (file->n_pins + BLOCK_RANGES - 1) / BLOCK_RANGES;
	struct page_search *s = calloc(1, sizeof(*s) + n_blocks * sizeof(s->blocks[0]));

	if (!s || (s->fd = fcntl(file->lease.fd, F_DUPFD_CLOEXEC, 3)) < 0) {
		free(s);
		return NULL;
	}
	s->broker = file->broker;
	s->file = file->id;
	s->lost_some = file->change.lost_some;
	s->allocated = file->backing.kind == BACKING_HUGETLBFS ? file->change.blocks * 512 : UINT64_MAX;
	s->left = selection_of_file(file, 0);
	s->n_max = file->n_pins;
	return s;
}

static void search_pages(struct file *file)
{
	struct change *change = &file->change;

	change->search = page_search_new(file);
	if (!change->search) {
		search_later(file);
		return;
	}
	change->lost_some = change->written = false;
	go_on(file);
}

/* ---- In slices ---- */

/* True: there is more to do. */
static bool do_some(struct file *file, const struct slice *slice)
{
	struct change *change = &file->change;
	struct page_search *s = change->search;

	if (change->cut && mark_some(change, slice))
		return true;
	if (s && s->step == STEP_LISTS) {
		if (list_some(s, slice))
			return true;
		page_search_look(s);
	}
	return s && s->step == STEP_JUDGES && judge_some(s, slice);
}

static int on_work(sd_event_source *source, uint64_t usec, void *userdata)
{
	go_on(userdata);
	return 0;
}

/* False: it cannot, and all has to be done at once. */
static bool do_later(struct file *file)
{
	struct change *change = &file->change;

	return (change->work || turn_add_source(file->broker->event, &change->work, on_work, file) >= 0) &&
	       sd_event_source_set_enabled(change->work, SD_EVENT_ONESHOT) >= 0;
}

static void go_on(struct file *file)
{
	struct slice slice = slice_begin();
	uint64_t id = file->id;
	struct broker *broker = file->broker;

	while (do_some(file, &slice))
		if (do_later(file))
			return;
	/* its last pin may end with what is revoked here, and it with that */
	if (file->change.cut)
		revoke_beyond(file);
	file = broker_find_file(broker, id);
	if (file && file->change.search && file->change.search->step == STEP_JUDGES)
		page_search_end(file);
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
	if (change->search || !(change->lost_some || change->written))
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
	struct log_fields fields = { .file = file->id, .path = file->path };
	struct conflict conflict = conflict_new(CAUSE_MODIFY);
	struct selection selection = selection_of_file(file, 0);
	unsigned n = file->n_pins - file->n_wanted;
	int r;

	if (n == 0)
		return;
	selection.unwanted = true;
	log_event(LOG_WARNING, MESSAGE_LEASE_BROKEN, &fields,
		  "%s was opened for writing and changed while it was exposed, under %u pin%s.", file->path, n,
		  PLURAL(n));
	r = revocation_start(file->broker, file, false, &conflict, &selection, UINT64_MAX, false, NULL);
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
	change->work = sd_event_source_disable_unref(change->work);
	/* the job finds that the file is no more */
	if (change->search && change->search->step != STEP_LOOKS)
		page_search_free(change->search);
	change->search = NULL;
}
