/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-kernel.h"
#include "ctl-mount.h"
#include "ctl-openers.h"
#include "ctl-probe.h"
#include "ctl.h"

#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <string.h>
#include <sys/sysmacros.h>

static const struct {
	const char *name, *what;
	const char *device; /* there where it can be used on this machine; NULL: everywhere */
} mechanisms[MECHANISMS] = {
	[MECHANISM_IO_URING] = {"io_uring", "io_uring fixed buffer", NULL},
	[MECHANISM_AF_XDP] = {"af_xdp", "AF_XDP umem", NULL},
	[MECHANISM_RDMA] = {"rdma", "RDMA memory region", "/sys/class/infiniband"},
	[MECHANISM_RDMA_ODP] = {"rdma-odp", "RDMA on-demand paging", "/sys/class/infiniband"},
	[MECHANISM_VFIO] = {"vfio", "VFIO mapping", "/dev/vfio/vfio"},
};

struct preflight {
	struct ctl *ctl;
	pinbroker *pb; /* NULL: no broker could be asked */
	const char *path;
	struct statx stx;
	struct mount mount;
	struct probe probe;
	struct pinbroker_preflight_info *leases[2]; /* owned, by access; NULL: not known */
	json_object *broker;                        /* owned; the file as list has it, or NULL */
	struct openers openers;
	struct kernel_use kernel;
};

/* ---- What is asked ---- */

static bool is_here(enum mechanism m)
{
	return !mechanisms[m].device || access(mechanisms[m].device, F_OK) == 0;
}

static const char *hazard(const struct preflight *p)
{
	if (p->probe.backing != BACKING_PAGE_CACHE)
		return NULL;
	if (strcmp(p->mount.type, "btrfs") == 0)
		return "What hardware writes into pages that the file system is writing back, or "
		       "has, may be lost, or fail its checksum: the file system is not told. "
		       "Store into the pages with the CPU and call msync() after the hardware has "
		       "written, or use tmpfs or hugetlbfs.";
	return "What hardware writes into pages that the file system has written back may be lost: "
	       "it is not told, and the pages count as clean. Store into the pages with the CPU "
	       "and call msync() after the hardware has written, or use tmpfs or hugetlbfs.";
}

static int find_broker_file(const struct pinbroker_file_info *info, void *userdata)
{
	struct preflight *p = userdata;
	json_object *o;

	if (info->device != makedev(p->stx.stx_dev_major, p->stx.stx_dev_minor) ||
		info->inode != p->stx.stx_ino)
		return 0;
	o = must(json_object_new_object());
	json_add_number(o, "file", info->file);
	json_add_string(o, "access", pinbroker_access_name(info->access));
	json_add_string(o, "lease", pinbroker_lease_state_name(info->lease));
	json_add_bool(o, "exposed", info->exposed);
	json_add_number(o, "pins", info->n_pins);
	p->broker = o;
	return 1;
}

/* 0, also where there is no broker: the rest can be told all the same. */
static int preflight_ask_broker(struct preflight *p, int fd)
{
	int r;

	r = ctl_client(p->ctl, &p->pb);
	if (r > 0)
		return r;
	for (unsigned access = 0; access < ELEMENTS(p->leases); access++) {
		r = pinbroker_preflight(p->pb, fd, access, &p->leases[access]);
		if (r < 0) {
			fail_call(p->pb, r, "Cannot ask the broker about %s", p->path);
			return 0;
		}
	}
	pinbroker_list_files(p->pb, find_broker_file, p);
	return 0;
}

static int preflight_look(struct preflight *p)
{
	_cleanup_(close_fdp) int fd = open(p->path, O_PATH | O_CLOEXEC);
	int r;

	if (fd < 0)
		return fail(EX_NOINPUT, "Cannot look at %s: %s.", visible(p->path), strerror(errno));
	if (statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &p->stx) < 0)
		return fail(EX_NOINPUT, "Cannot look at %s: %s.", p->path, strerror(errno));
	r = mount_of(fd, &p->mount);
	if (r < 0)
		return fail(EX_OSERR, "Cannot find out what %s is mounted on: %s.", p->path,
			strerror(-r));
	probe_file(p->path, &p->stx, &p->mount, &p->probe);
	openers_of_file(&p->mount, makedev(p->stx.stx_dev_major, p->stx.stx_dev_minor),
		p->stx.stx_ino, basename(p->path), &p->openers);
	r = preflight_ask_broker(p, fd);
	if (r == 0)
		kernel_use_find(p->path, &p->stx, &p->mount, p->broker, &p->kernel);
	return r;
}

/* Processes that keep the kernel from granting a lease. A file that is under one has none. */
static size_t n_in_the_way(const struct preflight *p, enum pinbroker_access access)
{
	unsigned uses = OPENER_WRITES | OPENER_MAPS_WRITABLE;
	size_t n = 0;

	if (access == PINBROKER_WRITE)
		uses |= OPENER_READS | OPENER_MAPS;
	for (size_t i = 0; i < p->openers.n && !p->broker; i++)
		n += (p->openers.list[i].uses & uses) != 0;
	return n;
}

/* ---- What is told ---- */

static json_object *lease_to_json(const struct preflight *p, enum pinbroker_access access)
{
	const struct pinbroker_preflight_info *info = p->leases[access];
	json_object *o;

	if (!info)
		return NULL;
	o = must(json_object_new_object());
	json_add_bool(o, "possible", info->leasable);
	json_add_string(o, "reason", info->reason);
	json_add_number(o, "inTheWay", n_in_the_way(p, access));
	if (p->kernel.granted[access] < 0)
		json_add(o, "granted", NULL);
	else
		json_add_bool(o, "granted", p->kernel.granted[access] > 0);
	json_add_number(o, "breakUSec", info->lease_break_usec);
	json_add_number(o, "settleUSec", info->settle_usec);
	return o;
}

static void verdict_to_json(json_object *o, const struct verdict *v)
{
	if (v->possible == VERDICT_UNKNOWN)
		json_add(o, "possible", NULL);
	else
		json_add_bool(o, "possible", v->possible == VERDICT_YES);
	json_add_bool(o, "tried", v->tried);
	json_add_string(o, "error", v->error < 0 ? strerrorname_np(-v->error) : NULL);
	json_add_string(o, "reason", v->reason);
}

static json_object *pins_to_json(const struct preflight *p)
{
	json_object *array = must(json_object_new_array());

	for (size_t i = 0; i < MECHANISMS * 2; i++) {
		json_object *o = must(json_object_new_object());

		json_add_string(o, "mechanism", mechanisms[i / 2].name);
		json_add_string(o, "access", pinbroker_access_name(i % 2));
		verdict_to_json(o, &p->probe.verdicts[i / 2][i % 2]);
		json_add_bool(o, "here", is_here(i / 2));
		json_object_array_add(array, o);
	}
	return array;
}

static void backing_to_json(json_object *o, const struct pinbroker_preflight_info *info)
{
	json_add_string(o, "deviceName", info ? info->device_name : NULL);
	json_add_string(o, "namespace", info ? info->nvdimm_namespace : NULL);
	json_add_string(o, "region", info ? info->nvdimm_region : NULL);
	json_add_number(o, "numaNode", info ? info->numa_node : PINBROKER_UNKNOWN);
}

static void preflight_print_json(const struct preflight *p)
{
	json_object *o = must(json_object_new_object()), *leases;

	json_add_string(o, "path", p->path);
	json_add_number(o, "size", p->stx.stx_size);
	json_add_number(o, "inode", p->stx.stx_ino);
	json_add_string(o, "fileSystem", p->mount.type);
	json_add_string(o, "mountPoint", p->mount.point);
	json_add_string(o, "source", p->mount.source);
	json_add_string(o, "backing", backing_name(p->probe.backing));
	backing_to_json(o, p->leases[PINBROKER_READ]);
	json_add(o, "broker", json_object_get(p->broker));
	leases = must(json_object_new_object());
	json_add(leases, "read", lease_to_json(p, PINBROKER_READ));
	json_add(leases, "write", lease_to_json(p, PINBROKER_WRITE));
	json_add(o, "lease", leases);
	json_add(o, "guard", NULL);
	json_add(o, "pins", pins_to_json(p));
	json_add_string(o, "hazard", hazard(p));
	json_add(o, "openers", openers_to_json(&p->openers));
	json_add_number(o, "hiddenProcesses", p->openers.n_hidden);
	json_add_string(o, "kernelHolders", p->kernel.holders);
	json_print(o, p->ctl);
}

/* The device and what it is on, which the broker knows. */
static void print_backing(const struct preflight *p)
{
	const struct pinbroker_preflight_info *info = p->leases[PINBROKER_READ];

	printf("  Backing: %s", backing_name(p->probe.backing));
	if (info && info->device_name)
		printf(", %s", info->device_name);
	if (info && info->nvdimm_namespace)
		printf(" of %s, %s", info->nvdimm_namespace, info->nvdimm_region);
	if (info && info->numa_node != PINBROKER_UNKNOWN)
		printf(", NUMA node %" PRIu64, info->numa_node);
	putchar('\n');
}

static void print_file(const struct preflight *p)
{
	_cleanup_(freep) char *path = escape_text(p->path);
	_cleanup_(freep) char *point = escape_text(p->mount.point);
	_cleanup_(freep) char *source = escape_text(p->mount.source);
	char size[32];

	format_size(p->stx.stx_size, size);
	printf("%s\n", path);
	printf("     File: %s, inode %" PRIu64 " of %s on %s (%s)\n", size,
		(uint64_t)p->stx.stx_ino, p->mount.type, point, source);
	print_backing(p);
}

static void print_lease(const struct preflight *p, enum pinbroker_access access)
{
	const struct pinbroker_preflight_info *info = p->leases[access];
	size_t n = n_in_the_way(p, access);

	printf("    Lease: for %s ", access == PINBROKER_READ ? "reading" : "writing");
	if (!info)
		puts("not known: no broker was asked");
	else if (info->leasable && p->probe.backing == BACKING_DEVICE_DAX)
		puts("none is needed: a device is not truncated");
	else if (!info->leasable)
		printf("no: %s\n", info->reason ?: "the broker does not say why");
	else if (n > 0)
		printf("not until %zu of the processes below ha%s closed it\n", n,
			n == 1 ? "s" : "ve");
	else if (p->kernel.granted[access] == 0)
		puts("no: the kernel grants none, as somebody has it open who is no process that can "
		     "be seen");
	else
		puts(p->kernel.granted[access] > 0 || p->broker ? "yes"
								: "yes, as far as can be seen");
}

static void print_times(const struct preflight *p)
{
	const struct pinbroker_preflight_info *info = p->leases[PINBROKER_WRITE];

	if (!info)
		return;
	if (info->lease_break_usec > 0)
		printf("   Breaks: the kernel waits %llu s at most (lease-break-time)\n",
			info->lease_break_usec / USEC_PER_SEC);
	else
		puts("   Breaks: the kernel waits without limit (lease-break-time is 0)");
	if (info->settle_usec > 0)
		printf("   Settle: readers wait for %llu s, once, after it is opened for "
		       "writing\n",
			info->settle_usec / USEC_PER_SEC);
	else
		puts("   Settle: readers are let in at once, which exposes the file to writers "
		     "meanwhile");
}

static void print_broker(const struct preflight *p)
{
	json_object *file, *lease, *pins;

	if (!p->broker) {
		puts(p->leases[PINBROKER_READ] ? "   Broker: it is not open through it now"
					       : "   Broker: not known: no broker was asked");
		return;
	}
	json_object_object_get_ex(p->broker, "file", &file);
	json_object_object_get_ex(p->broker, "lease", &lease);
	json_object_object_get_ex(p->broker, "pins", &pins);
	printf("   Broker: it is file %s, its lease is %s, with %s pin%s\n",
		json_object_get_string(file), json_object_get_string(lease),
		json_object_get_string(pins), PLURAL(json_object_get_int64(pins)));
}

static const struct column pin_columns[] = {
	{"PIN BY", "mechanism"},
	{"FOR", "access"},
	{"POSSIBLE", "possible"},
	{"", "reason", COLUMN_FLEXIBLE},
};

static const char *told_of(const struct verdict *v, bool here, char *buffer, size_t size)
{
	const char *reason = v->reason ?: v->tried ? "tried" : "";

	if (!v->reason && !here)
		return "this machine has no such device";
	if (v->error == 0)
		return reason;
	snprintf(buffer, size, "%s (%s%s)", reason, v->tried ? "tried: " : "",
		strerrorname_np(-v->error));
	return buffer;
}

static void print_pins(const struct preflight *p)
{
	static const char *const words[] = {
		[VERDICT_UNKNOWN] = "unknown", [VERDICT_NO] = "no", [VERDICT_YES] = "yes"};
	struct table *t = table_new(pin_columns, ELEMENTS(pin_columns));

	for (size_t i = 0; i < MECHANISMS * 2; i++) {
		const struct verdict *v = &p->probe.verdicts[i / 2][i % 2];
		char buffer[256];

		table_string(t, mechanisms[i / 2].what);
		table_string(t, pinbroker_access_name(i % 2));
		table_string(t, words[v->possible]);
		table_string(t, told_of(v, is_here(i / 2), buffer, sizeof(buffer)));
	}
	putchar('\n');
	table_print_rows(t, p->ctl);
	table_free(t);
}

static void preflight_print(const struct preflight *p)
{
	pager_open(p->ctl);
	print_file(p);
	print_lease(p, PINBROKER_READ);
	print_lease(p, PINBROKER_WRITE);
	print_times(p);
	print_broker(p);
	puts("    Guard: none besides the lease: what is cut or punched out through a\n"
	     "           descriptor that the broker handed out, or through an overlay, is\n"
	     "           seen afterwards; what deduplication replaces (on xfs) is not seen");
	print_pins(p);
	if (hazard(p))
		printf("\nHazard: %s\n", hazard(p));
	if (p->openers.n > 0 || p->openers.n_hidden > 0 || p->kernel.holders[0])
		puts("\nOpen by:");
	if (p->kernel.holders[0])
		printf("  the kernel: %s\n", p->kernel.holders);
	openers_print(&p->openers, stdout);
	pager_close();
}

int ctl_preflight(struct ctl *ctl, int argc, char *argv[])
{
	struct preflight p = {.ctl = ctl};
	bool leasable = false;
	int r;

	r = ctl_common_options(ctl, argc, argv);
	if (r >= 0)
		return r;
	if (argc - optind != 1)
		return fail_usage("Give one file to look at.");
	p.path = argv[optind];
	r = preflight_look(&p);
	if (r == 0 && ctl->json != JSON_OFF)
		preflight_print_json(&p);
	else if (r == 0)
		preflight_print(&p);
	for (size_t i = 0; i < ELEMENTS(p.leases); i++) {
		leasable |= p.leases[i] && p.leases[i]->leasable;
		pinbroker_preflight_free(p.leases[i]);
	}
	json_object_put(p.broker);
	openers_clear(&p.openers);
	pinbroker_unref(p.pb);
	return r ?: leasable ? EX_OK : EX_UNAVAILABLE;
}
