/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "holding.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "refuse-memory.h"

/*
 * libpinbroker is refused memory at one place after the other: a call that says -ENOMEM has done
 * nothing, the handle is of use afterwards, and a notice comes all the same (I4).
 */

static struct refusing *refusing;

static void refuse(long after)
{
	atomic_store(&refusing->n_asked, 0);
	atomic_store(&refusing->after, after);
	atomic_store(&refusing->n, 1);
	atomic_store(&refusing->on, true);
}

/* Returns whether anything had been refused. */
static bool grant(void)
{
	atomic_store(&refusing->on, false);
	return atomic_load(&refusing->n_asked) > atomic_load(&refusing->after);
}

struct pin_list {
	uint64_t pins[8];
	size_t n;
};

static int add_pin(const struct pinbroker_pin_info *info, void *userdata)
{
	struct pin_list *list = userdata;

	assert_true(list->n < 8);
	list->pins[list->n++] = info->pin;
	return 0;
}

/* Those that there are besides the one that is always held. */
static struct pin_list other_pins(struct holding *h)
{
	struct pin_list list = {}, others = {};

	must(h->pb, pinbroker_list_pins(h->pb, 0, 0, add_pin, &list));
	for (size_t i = 0; i < list.n; i++)
		if (list.pins[i] != h->pin)
			others.pins[others.n++] = list.pins[i];
	return others;
}

static void unpin_others(struct holding *h)
{
	struct pin_list others = other_pins(h);

	if (others.n > 0)
		must(h->pb, pinbroker_unpin(h->pb, others.pins, others.n, NULL, NULL));
}

/* ---- One call each, with what it takes before and after ---- */

static int try_connect(struct holding *h)
{
	pinbroker *pb;
	int r;

	r = pinbroker_new("another", socket_path, &pb);
	if (r < 0)
		return r;
	r = pinbroker_set_bus_address(pb, bus_address);
	if (r >= 0)
		r = pinbroker_connect(pb);
	pinbroker_unref(pb);
	return r;
}

static int try_open(struct holding *h)
{
	pinbroker_file *file;
	int r;

	r = pinbroker_open_file(h->pb, file_path, PINBROKER_READ, &file);
	if (r >= 0)
		pinbroker_file_free(file);
	return r;
}

static pinbroker_context *context;

static int try_add_context(struct holding *h)
{
	return pinbroker_add_context(h->pb, h->context_fd, "more", &context);
}

static void after_add_context(struct holding *h, int r)
{
	if (r >= 0)
		must(h->pb, pinbroker_remove_context(context));
}

static int try_pin(struct holding *h)
{
	static const struct pinbroker_range ranges[] = {{0, PAGE}, {PAGE, PAGE}};
	uint64_t pins[2];

	return pinbroker_pin(h->pb, h->file, h->context, ranges, 2, PINBROKER_READ, "two", pins);
}

static void after_pin(struct holding *h, int r)
{
	size_t n = other_pins(h).n;

	if (r == -ECONNRESET)
		assert_true(n == 0 || n == 2);
	else
		assert_int_equal(n, r < 0 ? 0 : 2);
	unpin_others(h);
}

static int try_bind(struct holding *h)
{
	return pinbroker_bind(h->pb, h->pin, 2);
}

static void before_unpin(struct holding *h)
{
	must(h->pb, try_pin(h));
}

static struct pin_list to_unpin;

static int try_unpin(struct holding *h)
{
	return pinbroker_unpin(h->pb, to_unpin.pins, to_unpin.n, NULL, NULL);
}

static void before_unpin_list(struct holding *h)
{
	before_unpin(h);
	to_unpin = other_pins(h);
}

static void after_unpin(struct holding *h, int r)
{
	if (r != -ECONNRESET)
		assert_int_equal(other_pins(h).n, r < 0 ? 2 : 0);
	unpin_others(h);
}

static int try_extend(struct holding *h)
{
	int r = pinbroker_extend(h->pb, 1ULL << 40, 1, NULL);

	return r == -ENOENT ? 0 : r;
}

static int ignore_pin(const struct pinbroker_pin_info *info, void *userdata)
{
	return 0;
}

static int try_list(struct holding *h)
{
	return pinbroker_list_pins(h->pb, 0, 0, ignore_pin, NULL);
}

static int try_preflight(struct holding *h)
{
	struct pinbroker_preflight_info *info;
	int r;

	r = pinbroker_preflight(h->pb, pinbroker_file_get_fd(h->file), PINBROKER_READ, &info);
	if (r >= 0)
		pinbroker_preflight_free(info);
	return r;
}

static const struct attempt {
	const char *name;
	int (*call)(struct holding *h);
	void (*before)(struct holding *h);
	void (*after)(struct holding *h, int r);
	bool changes; /* something, that it may not be known to have */
} attempts[] = {
	{"connect", try_connect},
	{"open_file", try_open},
	{"add_context", try_add_context, .after = after_add_context, .changes = true},
	{"pin", try_pin, .after = after_pin, .changes = true},
	{"bind", try_bind},
	{"unpin", try_unpin, before_unpin_list, after_unpin, .changes = true},
	{"extend", try_extend, .changes = true},
	{"list_pins", try_list},
	{"preflight", try_preflight},
};

/* At every place; returns how many there are. What was taken before the refusal is given back. */
static long refuse_everywhere(struct holding *h, const struct attempt *a)
{
	long live = atomic_load(&refusing->n_live), i;
	bool refused = true;

	for (i = 0; refused; i++) {
		int r;

		if (a->before)
			a->before(h);
		refuse(i);
		r = a->call(h);
		refused = grant();
		if (r < 0 && r != -ENOMEM && (r != -ECONNRESET || !a->changes))
			fail_msg("%s, refused after %ld: %d", a->name, i, r);
		if (r < 0 && !refused)
			fail_msg("%s fails without being refused anything: %d", a->name, r);
		if (a->after)
			a->after(h, r);
	}
	if (atomic_load(&refusing->n_live) > live)
		fail_msg("%s leaves %ld allocations", a->name,
			atomic_load(&refusing->n_live) - live);
	return i - 1;
}

static void test_calls(void **state)
{
	struct holding h;
	unsigned n;

	holding_begin(&h, PINBROKER_CHANNEL_WATCH);
	n = count_descriptors();
	for (size_t i = 0; i < sizeof(attempts) / sizeof(attempts[0]); i++) {
		long places;

		/* What is made once, and kept, is there afterwards. */
		must(h.pb, attempts[i].call(&h));
		if (attempts[i].after)
			attempts[i].after(&h, 0);
		places = refuse_everywhere(&h, &attempts[i]);
		print_message("%s: refused at %ld places\n", attempts[i].name, places);
		assert_in_range(places, 5, 1000);
	}
	assert_int_equal(count_descriptors(), n);
	/* And it is still whole. */
	holding_see_truncate(&h);
	holding_end(&h);
	world_stop();
}

static void let_go_in_the_end(struct holding *h, const struct pinbroker_notice *n)
{
	int r;

	h->seen.let_go = true;
	do
		r = pinbroker_unpin(h->pb, &h->pin, 1, NULL, NULL);
	while (r == -ENOMEM || r == -ECONNRESET);
	assert_true(r == 0 || r == -ENOENT);
}

static bool refuse_notice(unsigned channels, long after)
{
	struct holding h = {.on_notice = let_go_in_the_end};
	bool refused;

	holding_connect(&h, channels, false);
	holding_pin(&h);
	/* Who does not wait is not found out, so that there is this one notice. */
	assert_int_equal(open(file_path, O_RDWR | O_NONBLOCK | O_CLOEXEC), -1);
	assert_int_equal(errno, EAGAIN);
	refuse(after);
	while (!h.seen.let_go)
		must(h.pb, holding_dispatch(&h));
	refused = grant();
	holding_end(&h);
	return refused;
}

static void test_notices(void **state)
{
	static const unsigned channels[] = {PINBROKER_CHANNEL_WATCH, PINBROKER_CHANNEL_BUS};

	/* Longer than any of it takes: nobody is made to let go. */
	world_start("[Revocation]\nRevokeGraceSec=30\nSignalOnTimeout=none\n");
	mount_fs("tmpfs");
	make_file();
	for (size_t i = 0; i < 2; i++) {
		long k = 0;

		while (refuse_notice(channels[i], k))
			k++;
		print_message("channel %u: refused at %ld places\n", channels[i], k);
		assert_in_range(k, 10, 1000);
	}
	world_stop();
}

static int setup(void **state)
{
	refusing = refuse_here();
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_calls),
		cmocka_unit_test(test_notices),
	};

	return cmocka_run_group_tests(tests, setup, NULL);
}
