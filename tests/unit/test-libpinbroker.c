/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "client/internal.h"

#include <poll.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <cmocka.h>

/* ---- Which notices are new (I4: none is lost, and none is told twice) ---- */

static int admit(struct notice_memory *memory, uint64_t revocation, uint64_t file, pid_t pid,
	const uint64_t *pins, size_t n_pins, bool *ret_update)
{
	const struct pinbroker_notice notice = {
		.revocation = revocation,
		.file = file,
		.pid = pid,
		.pins = pins,
		.n_pins = n_pins,
	};

	return notice_memory_admit(memory, &notice, ret_update);
}

static const uint64_t pins[] = {9, 4, 7};

static int setup_memory(void **state)
{
	*state = calloc(1, sizeof(struct notice_memory));
	return *state ? 0 : -1;
}

static int teardown_memory(void **state)
{
	notice_memory_done(*state);
	free(*state);
	return 0;
}

static void test_second_channel_is_dropped(void **state)
{
	bool update = true;

	assert_int_equal(admit(*state, 1, 2, 0, pins, 3, &update), 1);
	assert_false(update);
	assert_int_equal(admit(*state, 1, 2, 0, pins, 3, &update), 0);
}

static void test_who_is_news_once(void **state)
{
	bool update = false;

	assert_int_equal(admit(*state, 1, 2, 0, pins, 3, &update), 1);
	assert_int_equal(admit(*state, 1, 2, 4711, pins, 3, &update), 1);
	assert_true(update);
	assert_int_equal(admit(*state, 1, 2, 4711, pins, 3, &update), 0);
	/* The slower channel's first notice. */
	assert_int_equal(admit(*state, 1, 2, 0, pins, 3, &update), 0);
}

static void test_who_from_the_start_is_no_update(void **state)
{
	bool update = true;

	assert_int_equal(admit(*state, 1, 2, 4711, pins, 3, &update), 1);
	assert_false(update);
	assert_int_equal(admit(*state, 1, 2, 0, pins, 3, &update), 0);
}

static void test_reason_is_news_once(void **state)
{
	struct pinbroker_notice notice = {.revocation = 1, .file = 2, .pins = pins, .n_pins = 3};
	bool update = false;

	assert_int_equal(notice_memory_admit(*state, &notice, &update), 1);
	notice.reason = "umount soon";
	assert_int_equal(notice_memory_admit(*state, &notice, &update), 1);
	assert_true(update);
	assert_int_equal(notice_memory_admit(*state, &notice, &update), 0);
	notice.reason = NULL;
	assert_int_equal(notice_memory_admit(*state, &notice, &update), 0);
}

static void test_files_and_revocations_are_apart(void **state)
{
	bool update = true;

	assert_int_equal(admit(*state, 1, 2, 0, pins, 1, &update), 1);
	assert_int_equal(admit(*state, 1, 3, 0, pins + 1, 1, &update), 1);
	assert_false(update);
	assert_int_equal(admit(*state, 2, 2, 0, pins, 1, &update), 1);
	assert_false(update);
	assert_int_equal(admit(*state, 1, 2, 4711, pins, 1, &update), 1);
	assert_int_equal(admit(*state, 1, 3, 4711, pins + 1, 1, &update), 1);
}

static void test_what_remains_is_no_news_but_another_pin_is(void **state)
{
	const uint64_t more[] = {4, 5};
	bool update = false;

	assert_int_equal(admit(*state, 1, 2, 0, pins, 3, &update), 1);
	assert_int_equal(admit(*state, 1, 2, 0, pins + 1, 1, &update), 0);
	assert_int_equal(admit(*state, 1, 2, 0, more, 2, &update), 1);
	assert_true(update);
	assert_int_equal(admit(*state, 1, 2, 0, more + 1, 1, &update), 0);
}

static void test_memory_is_bounded_and_forgets_the_oldest(void **state)
{
	bool update = true;

	for (uint64_t i = 1; i <= NOTICE_MEMORY + 1; i++)
		assert_int_equal(admit(*state, i, 1, 0, pins, 3, &update), 1);
	assert_int_equal(admit(*state, 2, 1, 0, pins, 3, &update), 0);
	assert_int_equal(admit(*state, 1, 1, 0, pins, 3, &update), 1);
	assert_false(update);
}

static void test_unknown_cause_is_softened(void **state)
{
	json_object *o = json_tokener_parse("{\"conflict\":{\"cause\":\"meteorite\"}}"), *cause;

	notice_soften(o);
	json_object_object_get_ex(json_object_object_get(o, "conflict"), "cause", &cause);
	assert_string_equal(json_object_get_string(cause), "modify");
	json_object_set_string(cause, "truncate");
	notice_soften(o);
	assert_string_equal(json_object_get_string(cause), "truncate");
	json_object_put(o);
	notice_soften(NULL);
}

/* ---- Errors ---- */

static const struct pinbroker_error *error_of(pinbroker *pb, const char *name, const char *json)
{
	json_object *o = json ? json_tokener_parse(json) : NULL;
	int r;

	r = error_from_reply(pb, name, o);
	json_object_put(o);
	assert_int_equal(r, pinbroker_last_error(pb)->error);
	assert_string_equal(pinbroker_last_error(pb)->name, name);
	return pinbroker_last_error(pb);
}

static int setup_handle(void **state)
{
	return pinbroker_new("test", "/nonexistent/socket", (pinbroker **)state);
}

static int teardown_handle(void **state)
{
	assert_null(pinbroker_unref(*state));
	return 0;
}

static void test_every_error_of_the_interface_has_a_number(void **state)
{
	char name[128];

	for (size_t i = 0; i < interface_pinbroker.n_errors; i++) {
		snprintf(name, sizeof(name), "org.pinbroker.%s",
			interface_pinbroker.errors[i]->name);
		assert_int_not_equal(error_number(name), -EREMOTEIO);
	}
	assert_int_equal(error_number("org.pinbroker.NotLeasable"), -EMEDIUMTYPE);
	assert_int_equal(error_number("org.pinbroker.Busy"), -EBUSY);
	assert_int_equal(error_number("org.pinbroker.RangeConflict"), -EAGAIN);
	assert_int_equal(error_number("org.pinbroker.NotAllowed"), -EACCES);
	assert_int_equal(error_number("org.pinbroker.LimitExceeded"), -EDQUOT);
	assert_int_equal(error_number("org.varlink.service.MethodNotFound"), -ENOSYS);
	assert_int_equal(error_number("com.example.Other"), -EREMOTEIO);
}

static void test_fields_become_sentences(void **state)
{
	const struct pinbroker_error *e;
	char json[256];

	e = error_of(*state, "org.pinbroker.NoSuchObject", "{\"type\":\"pin\",\"id\":17}");
	assert_int_equal(e->error, -ENOENT);
	assert_non_null(strstr(e->message, "pin 17"));
	assert_null(e->cause);

	e = error_of(*state, "org.pinbroker.LimitExceeded",
		"{\"limit\":\"MaxPinsPerUser\",\"maximum\":10,\"used\":9}");
	assert_non_null(strstr(e->message, "MaxPinsPerUser=10"));

	e = error_of(*state, "org.pinbroker.Revoked", "{\"revocation\":5,\"pins\":[3,4]}");
	assert_int_equal(e->error, -ESTALE);
	assert_int_equal(e->revocation, 5);
	assert_non_null(strstr(e->message, "Pins 3, 4 "));
	e = error_of(*state, "org.pinbroker.Revoked",
		"{\"revocation\":5,\"pins\":[1,2,3,4,5,6,7,8,9,10]}");
	assert_non_null(strstr(e->message, " 8 and 2 more went"));

	e = error_of(*state, "org.pinbroker.Revoked", "{\"revocation\":5,\"pins\":[]}");
	assert_int_equal(e->revocation, 5);
	assert_non_null(strstr(e->message, "has closed the file or context"));

	e = error_of(*state, "org.pinbroker.RangeConflict",
		"{\"revocation\":6,\"offset\":4096,\"length\":0}");
	assert_int_equal(e->revocation, 6);
	assert_non_null(strstr(e->message, "to the end of the file"));

	e = error_of(
		*state, "org.pinbroker.BeyondEndOfFile", "{\"offset\":1,\"length\":2,\"size\":3}");
	assert_int_equal(e->error, -ERANGE);

	snprintf(json, sizeof(json),
		"{\"cause\":\"settling\",\"untilUSec\":%llu,\"message\":\"It settles.\"}",
		(unsigned long long)(now_usec() + 60 * USEC_PER_SEC));
	e = error_of(*state, "org.pinbroker.Busy", json);
	assert_string_equal(e->cause, "settling");
	assert_true(e->until_usec > now_usec() && e->until_usec != PINBROKER_UNKNOWN);
	assert_non_null(strstr(e->message, "It settles. Try again in "));
	e = error_of(*state, "org.pinbroker.Busy",
		"{\"cause\":\"settling\",\"untilUSec\":1,\"message\":\"It has settled.\"}");
	assert_int_equal(e->until_usec, PINBROKER_UNKNOWN);
	/* and nothing of what was said before */
	assert_string_equal(e->message, "It has settled.");
}

static void test_odd_errors_still_say_something(void **state)
{
	const struct pinbroker_error *e;

	e = error_of(*state, "org.pinbroker.Busy", "{\"cause\":5}");
	assert_int_equal(e->error, -EBUSY);
	assert_non_null(strstr(e->message, "org.pinbroker.Busy"));
	e = error_of(*state, "com.example.Other", NULL);
	assert_int_equal(e->error, -EREMOTEIO);
	assert_int_equal(e->until_usec, PINBROKER_UNKNOWN);
}

static void test_error_belongs_to_its_handle(void **state)
{
	pinbroker *other;

	assert_int_equal(pinbroker_new(NULL, "/nonexistent/socket", &other), 0);
	assert_int_equal(pinbroker_bind(*state, 1, 1), -ENOTCONN);
	assert_int_equal(pinbroker_last_error(*state)->error, -ENOTCONN);
	assert_int_equal(pinbroker_last_error(other)->error, 0);
	pinbroker_unref(other);
}

/* The next handle may well lie at the same address. */
static void test_error_ends_with_its_handle(void **state)
{
	pinbroker *pb;

	for (int i = 0; i < 10; i++) {
		assert_int_equal(pinbroker_new(NULL, "/nonexistent/socket", &pb), 0);
		assert_int_equal(pinbroker_last_error(pb)->error, 0);
		assert_int_equal(pinbroker_bind(pb, 1, 1), -ENOTCONN);
		pinbroker_unref(pb);
	}
	assert_int_equal(pinbroker_last_error(NULL)->error, 0);
}

static void test_absent_broker_is_named(void **state)
{
	pinbroker_set_channels(*state, 0);
	assert_int_equal(pinbroker_connect(*state), -ENOENT);
	assert_non_null(strstr(pinbroker_last_error(*state)->message, "/nonexistent/socket"));
	assert_null(pinbroker_last_error(*state)->name);
}

static void test_child_is_turned_away(void **state)
{
	int status;
	pid_t pid;

	pid = fork();
	if (pid == 0) {
		int ok = pinbroker_connect(*state) == -ECHILD &&
			 pinbroker_get_fd(*state) == -ECHILD &&
			 pinbroker_dispatch(*state) == -ECHILD;

		_exit(ok ? 0 : 1);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
}

/* ---- Broken connections, with a broker that follows a script ---- */

enum action {
	END,
	ACCEPT, /* the next connection */
	ANSWER, /* reads a request and answers it */
	SAY,    /* sends without having been asked */
	READ,   /* reads a request */
	IGNORE, /* waits for a request and does not read it */
	CLOSE,
	GONE, /* waits for the client to close it */
	MEET, /* waits for the test, twice */
};

struct step {
	enum action action;
	int connection;
	const char *method; /* ANSWER, READ */
	const char *text;   /* ANSWER, SAY */
	size_t size;        /* of the text, if it is more than one message */
};

struct script {
	char directory[64];
	char path[80];
	int listen_fd;
	int fds[4];
	const struct step *steps;
	pthread_t thread;
	pthread_barrier_t meet;
	char error[256];
};

static bool script_read(struct script *s, const struct step *step)
{
	char request[4096] = "", name[128];
	size_t n = 0;

	do {
		if (n >= sizeof(request) || read(s->fds[step->connection], request + n, 1) != 1) {
			snprintf(s->error, sizeof(s->error), "no %s came", step->method);
			return false;
		}
	} while (request[n++]);
	snprintf(name, sizeof(name), "\"org.pinbroker.%s\"", step->method);
	if (strstr(request, name))
		return true;
	snprintf(s->error, sizeof(s->error), "no %s but %.200s", step->method, request);
	return false;
}

static void script_say(const struct script *s, const struct step *step)
{
	size_t n = step->size > 0 ? step->size : strlen(step->text) + 1;

	if (send(s->fds[step->connection], step->text, n, MSG_NOSIGNAL) != (ssize_t)n)
		abort();
}

static bool script_step(struct script *s, const struct step *step)
{
	struct pollfd pfd = {.fd = s->fds[step->connection], .events = POLLIN};
	char c;

	switch (step->action) {
	case ACCEPT:
		s->fds[step->connection] = accept(s->listen_fd, NULL, NULL);
		return s->fds[step->connection] >= 0;
	case ANSWER:
		if (!script_read(s, step))
			return false;
		script_say(s, step);
		return true;
	case SAY:
		script_say(s, step);
		return true;
	case READ:
		return script_read(s, step);
	case IGNORE:
		return poll(&pfd, 1, -1) == 1;
	case CLOSE:
		s->fds[step->connection] = safe_close(s->fds[step->connection]);
		return true;
	case GONE:
		return recv(s->fds[step->connection], &c, 1, 0) == 0;
	case MEET:
		pthread_barrier_wait(&s->meet);
		pthread_barrier_wait(&s->meet);
		return true;
	default:
		return false;
	}
}

static void *script_run(void *p)
{
	struct script *s = p;

	for (const struct step *step = s->steps; step->action != END; step++)
		if (!script_step(s, step)) {
			/* The client shall not wait for what does not come. */
			for (size_t i = 0; i < ELEMENTS(s->fds); i++)
				s->fds[i] = safe_close(s->fds[i]);
			s->listen_fd = safe_close(s->listen_fd);
			return NULL;
		}
	return NULL;
}

static pinbroker *script_new(struct script *s, const struct step *steps, unsigned channels)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	pinbroker *pb;

	*s = (struct script){.fds = {-1, -1, -1, -1}, .steps = steps};
	strcpy(s->directory, "/tmp/test-libpinbroker.XXXXXX");
	assert_non_null(mkdtemp(s->directory));
	snprintf(s->path, sizeof(s->path), "%s/socket", s->directory);
	strcpy(address.sun_path, s->path);
	s->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	assert_int_equal(bind(s->listen_fd, (struct sockaddr *)&address, sizeof(address)), 0);
	assert_int_equal(listen(s->listen_fd, 8), 0);
	pthread_barrier_init(&s->meet, NULL, 2);
	assert_int_equal(pthread_create(&s->thread, NULL, script_run, s), 0);

	assert_int_equal(pinbroker_new("test", s->path, &pb), 0);
	assert_int_equal(pinbroker_set_channels(pb, channels), 0);
	return pb;
}

static pinbroker *script_start(struct script *s, const struct step *steps, unsigned channels)
{
	pinbroker *pb = script_new(s, steps, channels);

	assert_int_equal(pinbroker_connect(pb), 0);
	return pb;
}

static void script_end(struct script *s)
{
	pthread_join(s->thread, NULL);
	for (size_t i = 0; i < ELEMENTS(s->fds); i++)
		safe_close(s->fds[i]);
	safe_close(s->listen_fd);
	pthread_barrier_destroy(&s->meet);
	unlink(s->path);
	rmdir(s->directory);
	assert_string_equal(s->error, "");
}

#define HELLO_REPLY                                                                            \
	"{\"parameters\":{\"client\":1,\"token\":\"t\",\"version\":\"0\",\"features\":[\"a\"," \
	"\"c\"]}}"
#define NOTICE(pid)                                                                            \
	"{\"revocation\":3,\"client\":1,\"file\":2,\"path\":\"/f\",\"pins\":[8],\"conflict\":" \
	"{\"cause\":\"truncate\",\"offset\":0,\"length\":0" pid "},\"deadlineUSec\":99}"
#define RESUME_REPLY     "{\"parameters\":{\"notices\":[" NOTICE("") "]}}"
#define WATCH_REPLY(pid) "{\"continues\":true,\"parameters\":{\"notice\":" NOTICE(pid) "}}"
#define NOT_LEASABLE                                               \
	"{\"error\":\"org.pinbroker.NotLeasable\",\"parameters\":" \
	"{\"cause\":\"type\",\"message\":\"No.\"}}"
#define EMPTY_REPLY "{\"parameters\":{}}"
#define NO_CLIENT                                                   \
	"{\"error\":\"org.pinbroker.NoSuchObject\",\"parameters\":" \
	"{\"type\":\"client\",\"id\":1}}"

struct seen {
	unsigned n, n_updates, n_lost;
	pid_t pid;
};

static void on_revoke(pinbroker *pb, const struct pinbroker_notice *notice, void *userdata)
{
	struct seen *seen = userdata;

	seen->n++;
	seen->n_updates += notice->update;
	seen->pid = notice->pid;
	assert_int_equal(notice->revocation, 3);
	assert_int_equal(notice->cause, PINBROKER_CAUSE_TRUNCATE);
	assert_int_equal(notice->n_pins, 1);
	assert_int_equal(notice->pins[0], 8);
	/* From within one's own dispatching there is no way in again. */
	assert_int_equal(pinbroker_dispatch(pb), -EBUSY);
}

static void dispatch_once(pinbroker *pb)
{
	struct pollfd pfd = {.fd = pinbroker_get_fd(pb), .events = POLLIN};

	assert_int_equal(poll(&pfd, 1, 10000), 1);
	pinbroker_dispatch(pb);
}

static int collect_feature(const char *feature, void *userdata)
{
	strcat(userdata, feature);
	return 0;
}

static int find_feature(const char *feature, void *userdata)
{
	strcat(userdata, feature);
	return strcmp(feature, "a") == 0 ? -ELOOP : 0;
}

static void test_broker_introduces_itself(void **state)
{
	static const struct step steps[] = {
		{ACCEPT, 0},
		{ANSWER, 0, "Hello", HELLO_REPLY},
		{END},
	};
	char names[8] = "";
	struct script s;
	pinbroker *pb;

	pb = script_new(&s, steps, 0);
	assert_null(pinbroker_get_version(pb));
	assert_int_equal(pinbroker_list_features(pb, collect_feature, names), -ENOTCONN);
	assert_int_equal(pinbroker_connect(pb), 0);
	assert_int_equal(pinbroker_connect(pb), -EISCONN);
	assert_string_equal(pinbroker_get_version(pb), "0");
	assert_int_equal(pinbroker_list_features(pb, collect_feature, names), 0);
	assert_string_equal(names, "ac");
	assert_int_equal(pinbroker_list_features(pb, find_feature, names), -ELOOP);
	assert_string_equal(names, "aca");
	assert_int_equal(pinbroker_has_feature(pb, "a"), 1);
	assert_int_equal(pinbroker_has_feature(pb, "b"), 0);
	pinbroker_unref(pb);
	script_end(&s);
}

static void test_unread_call_is_repeated_after_resume(void **state)
{
	static const struct step steps[] = {
		{ACCEPT, 0},
		{ANSWER, 0, "Hello", HELLO_REPLY},
		{IGNORE, 0},
		{CLOSE, 0},
		{ACCEPT, 1},
		{ANSWER, 1, "Resume", RESUME_REPLY},
		{ANSWER, 1, "Unpin", "{\"parameters\":{\"ended\":[8]}}"},
		{END},
	};
	const uint64_t pin = 8;
	struct seen seen = {};
	struct script s;
	uint64_t ended;
	pinbroker *pb;
	size_t n;

	pb = script_start(&s, steps, 0);
	pinbroker_set_revoke_callback(pb, on_revoke, &seen);
	assert_int_equal(pinbroker_unpin(pb, &pin, 1, &ended, &n), 0);
	assert_int_equal(n, 1);
	assert_int_equal(ended, 8);
	dispatch_once(pb);
	assert_int_equal(seen.n, 1);
	pinbroker_unref(pb);
	script_end(&s);
}

static void test_call_that_was_read_is_not_repeated(void **state)
{
	static const struct step steps[] = {
		{ACCEPT, 0},
		{ANSWER, 0, "Hello", HELLO_REPLY},
		{READ, 0, "Unpin"},
		{CLOSE, 0},
		{ACCEPT, 1},
		{ANSWER, 1, "Resume", RESUME_REPLY},
		{ANSWER, 1, "Bind", EMPTY_REPLY},
		{END},
	};
	const uint64_t pin = 8;
	struct script s;
	pinbroker *pb;

	pb = script_start(&s, steps, 0);
	assert_int_equal(pinbroker_unpin(pb, &pin, 1, NULL, NULL), -ECONNRESET);
	assert_int_equal(pinbroker_bind(pb, 8, 0), 0);
	pinbroker_unref(pb);
	script_end(&s);
}

static void test_lost_answer_about_a_file_is_asked_again(void **state)
{
	static const struct step steps[] = {
		{ACCEPT, 0},
		{ANSWER, 0, "Hello", HELLO_REPLY},
		{READ, 0, "OpenFile"},
		{CLOSE, 0},
		{ACCEPT, 1},
		{ANSWER, 1, "Resume", RESUME_REPLY},
		{ANSWER, 1, "OpenFile", NOT_LEASABLE},
		{END},
	};
	pinbroker_file *file;
	struct script s;
	pinbroker *pb;

	pb = script_start(&s, steps, 0);
	assert_int_equal(pinbroker_open_file(pb, "/dev/null", PINBROKER_READ, &file), -EMEDIUMTYPE);
	pinbroker_unref(pb);
	script_end(&s);
}

static void on_lost(pinbroker *pb, void *userdata)
{
	struct seen *seen = userdata;

	seen->n_lost++;
}

static void test_forgotten_client_is_told(void **state)
{
	static const struct step steps[] = {
		{ACCEPT, 0},
		{ANSWER, 0, "Hello", HELLO_REPLY},
		{CLOSE, 0},
		{ACCEPT, 1},
		{ANSWER, 1, "Resume", NO_CLIENT},
		{END},
	};
	struct seen seen = {};
	struct script s;
	pinbroker *pb;

	pb = script_new(&s, steps, 0);
	assert_int_equal(pinbroker_set_lost_callback(pb, on_lost, &seen), 0);
	assert_int_equal(pinbroker_connect(pb), 0);
	/* Nobody calls anything: the dispatcher finds out. */
	dispatch_once(pb);
	assert_int_equal(pinbroker_dispatch(pb), -ENOTRECOVERABLE);
	assert_int_equal(seen.n_lost, 1);
	assert_int_equal(pinbroker_bind(pb, 8, 0), -ENOTRECOVERABLE);
	pinbroker_unref(pb);
	script_end(&s);
}

static void test_watch_tells_a_forgotten_client(void **state)
{
	static const struct step steps[] = {
		{ACCEPT, 0},
		{ANSWER, 0, "Hello", HELLO_REPLY},
		{ACCEPT, 1},
		{ANSWER, 1, "Watch", NO_CLIENT},
		{END},
	};
	struct seen seen = {};
	struct script s;
	pinbroker *pb;

	pb = script_new(&s, steps, PINBROKER_CHANNEL_WATCH);
	assert_int_equal(pinbroker_set_lost_callback(pb, on_lost, &seen), 0);
	assert_int_equal(pinbroker_connect(pb), 0);
	dispatch_once(pb);
	assert_int_equal(pinbroker_dispatch(pb), -ENOTRECOVERABLE);
	assert_int_equal(seen.n_lost, 1);
	pinbroker_unref(pb);
	script_end(&s);
}

static void on_revoke_cause(pinbroker *pb, const struct pinbroker_notice *notice, void *userdata)
{
	*(int *)userdata = (int)notice->cause;
}

/* A broker that is newer may have other causes. */
static void test_unknown_cause_comes_through(void **state)
{
	static const struct step steps[] = {
		{ACCEPT, 0},
		{ANSWER, 0, "Hello", HELLO_REPLY},
		{ACCEPT, 1},
		{ANSWER, 1, "Watch",
			"{\"continues\":true,\"parameters\":{\"notice\":{\"revocation\":3,\"client\":1,"
			"\"file\":2,\"path\":\"/f\",\"pins\":[8],\"conflict\":{\"cause\":\"eclipse\","
			"\"offset\":0,\"length\":0},\"deadlineUSec\":99}}}"},
		{END},
	};
	struct script s;
	pinbroker *pb;
	int cause = -1;

	pb = script_start(&s, steps, PINBROKER_CHANNEL_WATCH);
	pinbroker_set_revoke_callback(pb, on_revoke_cause, &cause);
	dispatch_once(pb);
	assert_int_equal(cause, PINBROKER_CAUSE_MODIFY);
	pinbroker_unref(pb);
	script_end(&s);
}

static void test_answer_that_is_none(void **state)
{
	static const struct step steps[] = {
		{ACCEPT, 0},
		{ANSWER, 0, "Hello", HELLO_REPLY},
		{ANSWER, 0, "Bind", "{\"error\":5}"},
		{ANSWER, 0, "Bind", "{\"parameters\":5}"},
		{ANSWER, 0, "Bind", EMPTY_REPLY},
		{END},
	};
	struct script s;
	pinbroker *pb;

	pb = script_start(&s, steps, 0);
	assert_int_equal(pinbroker_bind(pb, 8, 0), -EPROTO);
	assert_int_equal(pinbroker_bind(pb, 8, 0), -EPROTO);
	assert_int_equal(pinbroker_bind(pb, 8, 0), 0);
	pinbroker_unref(pb);
	script_end(&s);
}

static void test_watch_comes_back_and_repeats_nothing(void **state)
{
	static const struct step steps[] = {
		{ACCEPT, 0},
		{ANSWER, 0, "Hello", HELLO_REPLY},
		{ACCEPT, 1},
		{ANSWER, 1, "Watch", WATCH_REPLY("")},
		{CLOSE, 1},
		{ACCEPT, 2},
		{ANSWER, 2, "Watch", WATCH_REPLY("")},
		{SAY, 2, NULL, WATCH_REPLY(",\"pid\":42")},
		{END},
	};
	struct seen seen = {};
	struct script s;
	pinbroker *pb;

	pb = script_start(&s, steps, PINBROKER_CHANNEL_WATCH);
	pinbroker_set_revoke_callback(pb, on_revoke, &seen);
	while (seen.n_updates == 0)
		dispatch_once(pb);
	assert_int_equal(seen.n, 2);
	assert_int_equal(seen.pid, 42);
	pinbroker_unref(pb);
	script_end(&s);
}

static void on_revoke_bind(pinbroker *pb, const struct pinbroker_notice *notice, void *userdata)
{
	atomic_int *bound = userdata;

	atomic_store(bound, pinbroker_bind(pb, notice->pins[0], 0) == 0);
}

static void test_own_thread_runs_the_callback(void **state)
{
	static const struct step steps[] = {
		{ACCEPT, 0},
		{ANSWER, 0, "Hello", HELLO_REPLY},
		{ACCEPT, 1},
		{ANSWER, 1, "Watch", WATCH_REPLY("")},
		{ANSWER, 0, "Bind", EMPTY_REPLY},
		{END},
	};
	atomic_int bound = 0;
	struct script s;
	pinbroker *pb;

	pb = script_new(&s, steps, PINBROKER_CHANNEL_WATCH);
	assert_int_equal(pinbroker_set_thread(pb, true), 0);
	pinbroker_set_revoke_callback(pb, on_revoke_bind, &bound);
	assert_int_equal(pinbroker_connect(pb), 0);
	assert_int_equal(pinbroker_set_thread(pb, false), -EISCONN);
	/* The script ends when the callback's call has been answered. */
	script_end(&s);
	pinbroker_unref(pb);
	assert_int_equal(atomic_load(&bound), 1);
}

static void on_revoke_release(pinbroker *pb, const struct pinbroker_notice *notice, void *userdata)
{
	atomic_int *n = userdata;

	atomic_fetch_add(n, 1);
	assert_null(pinbroker_unref(pb));
}

/* A second notice is there already when the first one's callback releases the handle. */
static const char two_notices[] = WATCH_REPLY("") "\0" WATCH_REPLY(",\"pid\":42");
static const struct step release_steps[] = {
	{ACCEPT, 0},
	{ANSWER, 0, "Hello", HELLO_REPLY},
	{ACCEPT, 1},
	{READ, 1, "Watch"},
	{SAY, 1, NULL, two_notices, sizeof(two_notices)},
	{GONE, 0},
	{END},
};

static void test_callback_may_release_the_handle(void **state)
{
	atomic_int n = 0;
	struct script s;
	pinbroker *pb;

	pb = script_start(&s, release_steps, PINBROKER_CHANNEL_WATCH);
	pinbroker_set_revoke_callback(pb, on_revoke_release, &n);
	dispatch_once(pb);
	script_end(&s);
	assert_int_equal(n, 1);
}

static void test_callback_may_release_a_handle_with_a_thread(void **state)
{
	atomic_int n = 0;
	struct script s;
	pinbroker *pb;

	pb = script_new(&s, release_steps, PINBROKER_CHANNEL_WATCH);
	assert_int_equal(pinbroker_set_thread(pb, true), 0);
	pinbroker_set_revoke_callback(pb, on_revoke_release, &n);
	assert_int_equal(pinbroker_connect(pb), 0);
	/* Ends when the connection does. */
	script_end(&s);
	assert_int_equal(atomic_load(&n), 1);
}

struct meeting {
	sem_t begun;
	atomic_bool ended;
};

static void on_revoke_meet(pinbroker *pb, const struct pinbroker_notice *notice, void *userdata)
{
	struct meeting *m = userdata;
	pinbroker_file *file;

	sem_post(&m->begun);
	while (atomic_load(&pb->n_refs) < REFS_ENDING)
		sched_yield();
	/* The calls' own references come and go all the same. */
	pinbroker_unref(pinbroker_ref(pb));
	assert_int_equal(pinbroker_open_file(pb, "/dev/null", PINBROKER_READ, &file), -EMEDIUMTYPE);
	assert_int_equal(pinbroker_dispatch(pb), -EBUSY);
	atomic_store(&m->ended, true);
}

static void test_unref_waits_for_the_callback(void **state)
{
	static const struct step steps[] = {
		{ACCEPT, 0},
		{ANSWER, 0, "Hello", HELLO_REPLY},
		{ACCEPT, 1},
		{ANSWER, 1, "Watch", WATCH_REPLY("")},
		{ANSWER, 0, "OpenFile", NOT_LEASABLE},
		{END},
	};
	struct meeting m = {};
	struct script s;
	pinbroker *pb;

	sem_init(&m.begun, 0, 0);
	pb = script_new(&s, steps, PINBROKER_CHANNEL_WATCH);
	assert_int_equal(pinbroker_set_thread(pb, true), 0);
	pinbroker_set_revoke_callback(pb, on_revoke_meet, &m);
	assert_int_equal(pinbroker_connect(pb), 0);
	assert_int_equal(pinbroker_dispatch(pb), -EBUSY);
	sem_wait(&m.begun);
	pinbroker_unref(pb);
	assert_true(atomic_load(&m.ended));
	script_end(&s);
	sem_destroy(&m.begun);
}

static void expect_child_releases(pinbroker *pb)
{
	sigset_t alarm_only;
	int status;
	pid_t pid;

	sigemptyset(&alarm_only);
	sigaddset(&alarm_only, SIGALRM);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) {
		/* The library's thread blocks all signals. */
		pthread_sigmask(SIG_UNBLOCK, &alarm_only, NULL);
		alarm(10);
		pinbroker_unref(pb);
		/* Not _exit(), at which valgrind would look for the other threads' memory. */
		raise(SIGKILL);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, SIGKILL);
}

static void on_revoke_fork(pinbroker *pb, const struct pinbroker_notice *notice, void *userdata)
{
	expect_child_releases(pb);
	sem_post(userdata);
}

static void test_fork_in_a_callback(void **state)
{
	struct script s;
	pinbroker *pb;
	sem_t done;

	sem_init(&done, 0, 0);
	pb = script_new(&s, release_steps, PINBROKER_CHANNEL_WATCH);
	assert_int_equal(pinbroker_set_thread(pb, true), 0);
	pinbroker_set_revoke_callback(pb, on_revoke_fork, &done);
	assert_int_equal(pinbroker_connect(pb), 0);
	sem_wait(&done);
	sem_wait(&done);
	pinbroker_unref(pb);
	script_end(&s);
	sem_destroy(&done);
}

static void *bind_pin(void *userdata)
{
	assert_int_equal(pinbroker_bind(userdata, 8, 0), 0);
	return NULL;
}

/* Another thread waits for its answer, with the lock, when the process forks. */
static void test_fork_during_a_call(void **state)
{
	static const struct step steps[] = {
		{ACCEPT, 0},
		{ANSWER, 0, "Hello", HELLO_REPLY},
		{READ, 0, "Bind"},
		{MEET},
		{SAY, 0, NULL, EMPTY_REPLY},
		{END},
	};
	pthread_t thread;
	struct script s;
	pinbroker *pb;

	pb = script_start(&s, steps, 0);
	assert_int_equal(pthread_create(&thread, NULL, bind_pin, pb), 0);
	pthread_barrier_wait(&s.meet);
	expect_child_releases(pb);
	pthread_barrier_wait(&s.meet);
	pthread_join(thread, NULL);
	pinbroker_unref(pb);
	script_end(&s);
}

int main(void)
{
#define MEMORY(f) cmocka_unit_test_setup_teardown(f, setup_memory, teardown_memory)
#define HANDLE(f) cmocka_unit_test_setup_teardown(f, setup_handle, teardown_handle)
	const struct CMUnitTest tests[] = {
		MEMORY(test_second_channel_is_dropped),
		MEMORY(test_who_is_news_once),
		MEMORY(test_who_from_the_start_is_no_update),
		MEMORY(test_reason_is_news_once),
		MEMORY(test_files_and_revocations_are_apart),
		MEMORY(test_what_remains_is_no_news_but_another_pin_is),
		MEMORY(test_memory_is_bounded_and_forgets_the_oldest),
		cmocka_unit_test(test_unknown_cause_is_softened),
		HANDLE(test_every_error_of_the_interface_has_a_number),
		HANDLE(test_fields_become_sentences),
		HANDLE(test_odd_errors_still_say_something),
		HANDLE(test_error_belongs_to_its_handle),
		HANDLE(test_error_ends_with_its_handle),
		HANDLE(test_absent_broker_is_named),
		HANDLE(test_child_is_turned_away),
		cmocka_unit_test(test_broker_introduces_itself),
		cmocka_unit_test(test_unread_call_is_repeated_after_resume),
		cmocka_unit_test(test_call_that_was_read_is_not_repeated),
		cmocka_unit_test(test_forgotten_client_is_told),
		cmocka_unit_test(test_watch_tells_a_forgotten_client),
		cmocka_unit_test(test_unknown_cause_comes_through),
		cmocka_unit_test(test_answer_that_is_none),
		cmocka_unit_test(test_watch_comes_back_and_repeats_nothing),
		cmocka_unit_test(test_lost_answer_about_a_file_is_asked_again),
		cmocka_unit_test(test_own_thread_runs_the_callback),
		cmocka_unit_test(test_callback_may_release_the_handle),
		cmocka_unit_test(test_callback_may_release_a_handle_with_a_thread),
		cmocka_unit_test(test_unref_waits_for_the_callback),
		cmocka_unit_test(test_fork_in_a_callback),
		cmocka_unit_test(test_fork_during_a_call),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
