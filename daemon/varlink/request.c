/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/varlink/request.h"

#include <errno.h>
#include <string.h>

static bool is_true(json_object *message, const char *key)
{
	json_object *value;

	return json_object_object_get_ex(message, key, &value) && json_object_get_boolean(value);
}

static const struct method *find_method(const char *name)
{
	size_t n = strlen(INTERFACE_NAME);

	if (strncmp(name, INTERFACE_NAME, n) != 0 || name[n] != '.')
		return NULL;
	return interface_find_method(&interface_pinbroker, name + n + 1);
}

int request_read(struct request *request, json_object *message)
{
	json_object *value;

	*request = (struct request){ .message = message };
	if (!json_object_object_get_ex(message, "method", &value) ||
	    !json_object_is_type(value, json_type_string))
		return -EBADMSG;
	request->name = json_object_get_string(value);
	if (json_object_object_get_ex(message, "parameters", &request->parameters) &&
	    request->parameters && !json_object_is_type(request->parameters, json_type_object))
		return -EBADMSG;
	request->more = is_true(message, "more");
	request->oneway = is_true(message, "oneway");
	request->method = find_method(request->name);
	if (request->method && request->method->more && !request->more)
		return 0; /* it will not come to its parameters */
	if (request->method)
		request->result = schema_read(request->method->in, request->parameters, 0, &request->in,
					      &request->field);
	return 0;
}

void request_clear(struct request *request)
{
	if (request->method && request->result >= 0)
		schema_clear(request->method->in, &request->in);
	json_object_put(request->message);
	*request = (struct request){};
}
