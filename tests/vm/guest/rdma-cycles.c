/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * DEVICE FILE CYCLES: two threads register and deregister one page each time, while a third has the
 * broker force off, again and again, one of those pages that have even numbers. Handles are reused
 * all the time: no region of an odd page may ever be gone, and of the even ones no more than were
 * named (I8).
 */

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <systemd/sd-bus.h>
#include <time.h>

#include "client/examples/rdma-pair.h"
#include "client/verbs.h"
#include "protocol/macro.h"

#define THREADS 2
#define SLOTS   8 /* of a thread; each is a page, and has at most one region */
#define PAGE    4096

#define BETWEEN 25 /* cycles from one forced detach to the next, during which all stand still */

static pinbroker *pb;
static pinbroker_file *file;
static struct ibv_pd *pd;
static char *map;

static atomic_uint cycles, cycles_max, gone, refused, named, too_late, signals;
static atomic_bool done;

static void check(bool good, const char *what)
{
	if (good)
		return;
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	_exit(EXIT_FAILURE);
}

static void on_signal(int sig)
{
	signals++;
}

static void let_go(struct ibv_mr *mr, unsigned page)
{
	int is = handle_is_of(mr);

	errno = 0;
	check(is >= 0, "Cannot query a region");
	if (is == 0) {
		check(page % 2 == 0, "A region that nobody had named was destroyed");
		gone++;
	}
	errno = -pinbroker_dereg_mr(pb, mr);
	check(errno == 0, "pinbroker_dereg_mr");
}

static void *work(void *arg)
{
	unsigned first = (unsigned)(uintptr_t)arg * SLOTS;
	struct ibv_mr *regions[SLOTS] = {0};

	for (unsigned i = 0; cycles++ < cycles_max; i++) {
		unsigned slot = i % SLOTS, page = first + slot;

		if (regions[slot])
			let_go(regions[slot], page);
		regions[slot] = pinbroker_reg_mr(pb, file, (uint64_t)page * PAGE, pd,
			map + (size_t)page * PAGE, PAGE, IBV_ACCESS_LOCAL_WRITE);
		if (!regions[slot]) {
			check(errno == ESTALE || errno == EAGAIN, "pinbroker_reg_mr");
			refused++;
		}
	}
	for (unsigned slot = 0; slot < SLOTS; slot++)
		if (regions[slot])
			let_go(regions[slot], first + slot);
	return NULL;
}

struct choice {
	unsigned n;
	uint64_t pins[THREADS * SLOTS];
};

static int choose(const struct pinbroker_pin_info *info, void *userdata)
{
	struct choice *c = userdata;

	if (info->state == PINBROKER_PIN_BOUND && info->offset / PAGE % 2 == 0 &&
		c->n < THREADS * SLOTS)
		c->pins[c->n++] = info->pin;
	return 0;
}

static void revoke_pin(sd_bus *bus, uint64_t pin)
{
	_cleanup_(sd_bus_error_free) sd_bus_error error = SD_BUS_ERROR_NULL;
	int r = sd_bus_call_method(bus, "org.pinbroker1", "/org/pinbroker1",
		"org.pinbroker1.Manager", "RevokePins", &error, NULL, "atst", 1, pin, "cycles",
		UINT64_C(1));

	if (r >= 0)
		named++;
	else if (sd_bus_error_has_name(&error, "org.pinbroker1.Error.NoSuchObject"))
		too_late++;
	else
		check(false, error.message);
}

static void *force(void *arg)
{
	unsigned seed = 1, next = 0;
	sd_bus *bus = NULL;

	check(sd_bus_open_system(&bus) >= 0, "Cannot connect to the bus");
	while (!done) {
		struct choice c = {0};

		if (cycles < next) {
			usleep(1000);
			continue;
		}
		next = cycles + BETWEEN;
		check(pinbroker_list_pins(pb, 0, 0, choose, &c) >= 0, "pinbroker_list_pins");
		if (c.n > 0)
			revoke_pin(bus, c.pins[(unsigned)rand_r(&seed) % c.n]);
	}
	sd_bus_unref(bus);
	return NULL;
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

int main(int argc, char *argv[])
{
	pthread_t threads[THREADS], forcing;
	struct ibv_context *context;
	double begin;

	if (argc != 4)
		return EXIT_FAILURE;
	cycles_max = (unsigned)atoi(argv[3]);
	signal(SIGBUS, on_signal);
	check(pinbroker_new("cycles", NULL, &pb) == 0 && pinbroker_connect(pb) == 0, "connect");
	check(pinbroker_open_file(pb, argv[2], PINBROKER_WRITE, &file) == 0, argv[2]);
	map = mmap(NULL, THREADS * SLOTS * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
		pinbroker_file_get_fd(file), 0);
	check(map != MAP_FAILED, "mmap");
	context = device_open(argv[1]);
	pd = ibv_alloc_pd(context);
	check(pd, argv[1]);
	begin = now();
	for (uintptr_t i = 0; i < THREADS; i++)
		check(pthread_create(&threads[i], NULL, work, (void *)i) == 0, "pthread_create");
	check(pthread_create(&forcing, NULL, force, NULL) == 0, "pthread_create");
	for (unsigned i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	done = true;
	pthread_join(forcing, NULL);
	printf("%u cycles in %.1f s: %u pins named, %u of their regions destroyed, %u let go of "
	       "before; "
	       "%u registrations refused, %u signals\n",
		cycles_max, now() - begin, named, gone, too_late, refused, signals);
	check(gone > 0 && gone <= named && signals == 0, "The figures");
	ibv_dealloc_pd(pd);
	check(pinbroker_close_device(pb, context) == 0, "pinbroker_close_device");
	munmap(map, THREADS * SLOTS * PAGE);
	check(pinbroker_close_file(file) == 0, "pinbroker_close_file");
	pinbroker_unref(pb);
	return EXIT_SUCCESS;
}
