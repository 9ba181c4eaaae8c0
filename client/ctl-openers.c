/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-openers.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <string.h>
#include <sys/sysmacros.h>

struct place {
	const struct mount *mount;
	dev_t device;
	ino_t inode;           /* of a file; 0: a mount is looked for */
	const char *name;      /* of a file */
	const char *directory; /* of a mount */
};

static const struct {
	unsigned use;
	const char *text;
} use_names[] = {
	{OPENER_READS, "reads"},
	{OPENER_WRITES, "writes"},
	{OPENER_NAMES, "path only"},
	{OPENER_MAPS, "maps"},
	{OPENER_MAPS_WRITABLE, "maps writable"},
	{OPENER_RUNS, "runs there"},
};

static FILE *open_in(int directory_fd, const char *name)
{
	int fd = openat(directory_fd, name, O_RDONLY | O_CLOEXEC);
	FILE *f = fd >= 0 ? fdopen(fd, "re") : NULL;

	if (!f)
		safe_close(fd);
	return f;
}

static void close_directoryp(DIR **d)
{
	if (*d)
		closedir(*d);
}

/* ---- Descriptors ---- */

static bool same_file(int process_fd, const char *number, const struct place *place)
{
	char path[32];
	struct stat st;

	snprintf(path, sizeof(path), "fd/%s", number);
	return fstatat(process_fd, path, &st, 0) == 0 && st.st_dev == place->device &&
	       st.st_ino == place->inode;
}

/* fdinfo is asked first: a stat would wait for whatever stands behind a descriptor. */
static unsigned look_at_descriptor(int process_fd, const char *number, const struct place *place)
{
	unsigned long long mount_id = 0, inode = 0;
	unsigned flags = 0;
	_cleanup_(close_filep) FILE *f = NULL;
	char path[32], line[256];

	snprintf(path, sizeof(path), "fdinfo/%s", number);
	f = open_in(process_fd, path);
	while (f && fgets(line, sizeof(line), f)) {
		(void)sscanf(line, "flags: %o", &flags);
		(void)sscanf(line, "mnt_id: %llu", &mount_id);
		if (sscanf(line, "ino: %llu", &inode) == 1)
			break;
	}
	if (!f || (place->inode == 0 && mount_id != place->mount->id))
		return 0;
	if (place->inode != 0 && (inode != place->inode || !same_file(process_fd, number, place)))
		return 0;
	if (flags & O_PATH)
		return OPENER_NAMES;
	return (flags & O_ACCMODE) == O_RDONLY   ? OPENER_READS
	       : (flags & O_ACCMODE) == O_WRONLY ? OPENER_WRITES
						 : OPENER_READS | OPENER_WRITES;
}

/* Negative errno if the process may not be looked into. */
static int look_at_descriptors(int process_fd, const struct place *place, unsigned *uses)
{
	int fd = openat(process_fd, "fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	_cleanup_(close_directoryp) DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
	struct dirent *entry;

	if (!d) {
		int r = -errno;

		safe_close(fd);
		return r;
	}
	while ((entry = readdir(d)))
		if (isdigit((unsigned char)*entry->d_name))
			*uses |= look_at_descriptor(process_fd, entry->d_name, place);
	return 0;
}

/* ---- Mappings, and what else keeps a mount busy ---- */

/* On btrfs maps has the number of the file system, in which inode numbers recur. Whoever may not follow the link
 * goes by the name. */
static bool is_mapped_file(int process_fd, const char *addresses, const char *path,
	const struct place *place)
{
	const char *name = strrchr(path, '/');
	char link[64];
	struct stat st;

	snprintf(link, sizeof(link), "map_files/%s", addresses);
	if (fstatat(process_fd, link, &st, 0) == 0)
		return st.st_dev == place->device && st.st_ino == place->inode;
	return place->mount->file_system == place->device ||
	       (name && strncmp(name + 1, place->name, strlen(place->name)) == 0);
}

static unsigned look_at_mappings(int process_fd, const struct place *place)
{
	_cleanup_(close_filep) FILE *f = open_in(process_fd, "maps");
	_cleanup_(freep) char *line = NULL;
	size_t size = 0;
	unsigned uses = 0;

	while (f && getline(&line, &size, f) > 0) {
		char addresses[48], permissions[5];
		unsigned major_number, minor_number;
		unsigned long long inode;
		int path = 0;

		if (sscanf(line, "%47s %4s %*s %x:%x %llu %n", addresses, permissions,
			    &major_number, &minor_number, &inode, &path) < 5 ||
			path == 0 ||
			makedev(major_number, minor_number) != place->mount->file_system)
			continue;
		if (place->inode == 0 ? !is_below(line + path, place->directory)
				      : inode != place->inode || !is_mapped_file(process_fd, addresses,
									 line + path, place))
			continue;
		uses |= permissions[1] == 'w' && permissions[3] == 's' ? OPENER_MAPS_WRITABLE
								       : OPENER_MAPS;
	}
	return uses;
}

static unsigned look_at_links(int process_fd, const struct place *place)
{
	static const char *const links[] = {"exe", "cwd", "root"};
	struct statx stx;

	for (size_t i = 0; i < ELEMENTS(links); i++)
		if (statx(process_fd, links[i], AT_STATX_DONT_SYNC, STATX_MNT_ID, &stx) == 0 &&
			stx.stx_mnt_id == place->mount->id)
			return OPENER_RUNS;
	return 0;
}

/* ---- Processes ---- */

static void openers_add(struct openers *openers, pid_t pid, int process_fd, unsigned uses)
{
	_cleanup_(close_filep) FILE *f = open_in(process_fd, "comm");
	struct opener *o;
	struct stat st;

	openers->list = must(realloc(openers->list, (openers->n + 1) * sizeof(*openers->list)));
	o = &openers->list[openers->n++];
	*o = (struct opener){.pid = pid, .uid = PINBROKER_NO_UID, .uses = uses};
	if (fstat(process_fd, &st) == 0)
		o->uid = st.st_uid;
	if (f && fgets(o->comm, sizeof(o->comm), f))
		o->comm[strcspn(o->comm, "\n")] = 0;
}

static void look_at_process(struct openers *openers, const char *pid, const struct place *place)
{
	_cleanup_(close_fdp) int process_fd = -1;
	unsigned uses = 0;
	char path[32];

	snprintf(path, sizeof(path), "/proc/%.16s", pid);
	process_fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (process_fd < 0)
		return;
	if (look_at_descriptors(process_fd, place, &uses) == -EACCES)
		openers->n_hidden++;
	uses |= look_at_mappings(process_fd, place);
	if (place->inode == 0)
		uses |= look_at_links(process_fd, place);
	if (uses != 0)
		openers_add(openers, (pid_t)strtol(pid, NULL, 10), process_fd, uses);
}

static void openers_find(const struct place *place, struct openers *ret)
{
	_cleanup_(close_directoryp) DIR *d = opendir("/proc");
	struct dirent *entry;

	*ret = (struct openers){};
	while (d && (entry = readdir(d)))
		if (isdigit((unsigned char)*entry->d_name) &&
			strtol(entry->d_name, NULL, 10) != getpid())
			look_at_process(ret, entry->d_name, place);
}

void openers_of_file(const struct mount *mount, dev_t device, ino_t inode, const char *name,
	struct openers *ret)
{
	openers_find(
		&(struct place){.mount = mount, .device = device, .inode = inode, .name = name},
		ret);
}

void openers_of_mount(const struct mount *mount, const char *directory, struct openers *ret)
{
	openers_find(&(struct place){.mount = mount, .directory = directory}, ret);
}

void openers_clear(struct openers *openers)
{
	free(openers->list);
	*openers = (struct openers){};
}

/* ---- What is told ---- */

json_object *openers_to_json(const struct openers *openers)
{
	json_object *array = must(json_object_new_array());

	for (size_t i = 0; i < openers->n; i++) {
		const struct opener *opener = &openers->list[i];
		json_object *o = must(json_object_new_object());
		json_object *uses = must(json_object_new_array());

		json_add_number(o, "pid", (uint64_t)opener->pid);
		json_add_number(o, "uid",
			opener->uid != PINBROKER_NO_UID ? opener->uid : PINBROKER_UNKNOWN);
		json_add_string(o, "comm", opener->comm);
		for (size_t j = 0; j < ELEMENTS(use_names); j++)
			if (opener->uses & use_names[j].use)
				json_object_array_add(
					uses, must(json_object_new_string(use_names[j].text)));
		json_add(o, "uses", uses);
		json_object_array_add(array, o);
	}
	return array;
}

void openers_print(const struct openers *openers, FILE *f)
{
	for (size_t i = 0; i < openers->n; i++) {
		const struct opener *o = &openers->list[i];
		_cleanup_(freep) char *comm = escape_text(o->comm);
		const char *separator = " ";

		fprintf(f, "  %s (pid %d, uid %d)", comm, (int)o->pid, (int)o->uid);
		for (size_t j = 0; j < ELEMENTS(use_names); j++)
			if (o->uses & use_names[j].use) {
				fprintf(f, "%s%s", separator, use_names[j].text);
				separator = ", ";
			}
		fputc('\n', f);
	}
	if (openers->n_hidden > 0)
		fprintf(f, "  %zu process%s could not be looked into: that takes root.\n",
			openers->n_hidden, openers->n_hidden == 1 ? "" : "es");
}
