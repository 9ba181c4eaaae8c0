/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-event.h"

#include <string.h>
#include <time.h>

json_object *event_new(const char *name, const char *path)
{
	json_object *o = must(json_object_new_object());

	json_add_string(o, "event", name);
	json_add_string(o, "path", path);
	return o;
}

static void say_word(const char *key, json_object *value)
{
	_cleanup_(freep) char *word = escape_word(json_object_get_string(value));

	if (key)
		printf(" %s %s", key, word);
	else
		fputs(word, stdout);
}

static void say_list(const char *key, json_object *array)
{
	printf(" %s ", key);
	for (size_t i = 0; i < json_object_array_length(array); i++)
		printf("%s%s", i > 0 ? "," : "",
			json_object_get_string(json_object_array_get_idx(array, i)));
}

static void say_words(json_object *o)
{
	json_object_object_foreach(o, key, value)
	{
		if (json_object_is_type(value, json_type_array))
			say_list(key, value);
		else if (json_object_is_type(value, json_type_double))
			printf(" %s %.3f", key, json_object_get_double(value));
		else if (value && strcmp(key, "event") == 0)
			say_word(NULL, value);
		else if (value && strcmp(key, "path") == 0) {
			putchar(' ');
			say_word(NULL, value);
		} else if (value)
			say_word(key, value);
	}
	putchar('\n');
}

void event_say(json_object *o, const struct ctl *ctl)
{
	struct timespec ts;
	char hms[16], text[32];
	struct tm tm;

	clock_gettime(CLOCK_REALTIME, &ts);
	localtime_r(&ts.tv_sec, &tm);
	strftime(hms, sizeof(hms), "%H:%M:%S", &tm);
	snprintf(text, sizeof(text), "%s.%03ld", hms, ts.tv_nsec / 1000000);
	json_add_string(o, "time", text);
	if (ctl->json != JSON_OFF) {
		json_print(o, ctl);
	} else {
		say_words(o);
		json_object_put(o);
	}
	/* What has happened has happened, whether that can be written or not. */
	(void)write_out();
}
