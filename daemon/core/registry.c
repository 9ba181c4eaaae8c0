/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/broker.h"

#include "daemon/core/observer.h"

/*
 * The registries: every object by its id, files by inode and descriptor too. Trees, for they are paged
 * through in order, and inserting never fails.
 */

#define COMPARE(name, type, member)                                                                \
	static int compare_##name(const struct type *a, const struct type *b)                      \
	{                                                                                          \
		return a->member < b->member ? -1 : a->member > b->member;                         \
	}

static int compare_inode(const struct file *a, const struct file *b)
{
	if (a->key.device != b->key.device)
		return a->key.device < b->key.device ? -1 : 1;
	return a->key.inode < b->key.inode ? -1 : a->key.inode > b->key.inode;
}

COMPARE(client, client, id)
COMPARE(context, context, id)
COMPARE(file, file, id)
COMPARE(pin, pin, id)
COMPARE(revocation, revocation, id)
COMPARE(fd, file, lease.fd)

TREE_GENERATE(client_ids, client, by_id, compare_client)
TREE_GENERATE(context_ids, context, by_id, compare_context)
TREE_GENERATE(file_ids, file, by_id, compare_file)
TREE_GENERATE(pin_ids, pin, by_id, compare_pin)
TREE_GENERATE(revocation_ids, revocation, by_id, compare_revocation)
TREE_GENERATE(file_inodes, file, by_inode, compare_inode)
TREE_GENERATE(file_fds, file, by_fd, compare_fd)

/* find and next by id, for one kind; ids begin at 1 */
#define LOOK_UP(type, member)                                                                      \
	struct type *broker_find_##type(struct broker *broker, uint64_t id)                        \
	{                                                                                          \
		return type##_ids_RB_FIND(&broker->member, &(struct type){ .id = id });            \
	}                                                                                          \
	struct type *broker_next_##type(struct broker *broker, uint64_t after)                     \
	{                                                                                          \
		if (after == UINT64_MAX)                                                           \
			return NULL;                                                               \
		return type##_ids_RB_NFIND(&broker->member, &(struct type){ .id = after + 1 });    \
	}

LOOK_UP(client, clients)
LOOK_UP(context, contexts)
LOOK_UP(file, files)
LOOK_UP(pin, pins)
LOOK_UP(revocation, revocations)

struct file *broker_find_inode(struct broker *broker, struct inode_key key)
{
	return file_inodes_RB_FIND(&broker->files_by_inode, &(struct file){ .key = key });
}

struct file *broker_find_lease_fd(struct broker *broker, int fd)
{
	return file_fds_RB_FIND(&broker->files_by_fd, &(struct file){ .lease.fd = fd });
}

uint64_t broker_next_id(struct broker *broker)
{
	uint64_t reserved = broker->ids.reserved, id = ids_next(&broker->ids);

	if (broker->ids.reserved != reserved)
		observe_ids(&broker->observers, broker->ids.reserved);
	return id;
}

void broker_add_client(struct broker *broker, struct client *client)
{
	client_ids_RB_INSERT(&broker->clients, client);
	broker->n_clients++;
	observe_client(client, OBSERVED_ADDED);
}

void broker_remove_client(struct broker *broker, struct client *client)
{
	observe_client(client, OBSERVED_REMOVED);
	client_ids_RB_REMOVE(&broker->clients, client);
	broker->n_clients--;
}

void broker_add_context(struct broker *broker, struct context *context)
{
	context_ids_RB_INSERT(&broker->contexts, context);
	observe_context(context, OBSERVED_ADDED);
}

void broker_remove_context(struct broker *broker, struct context *context)
{
	observe_context(context, OBSERVED_REMOVED);
	context_ids_RB_REMOVE(&broker->contexts, context);
}

void broker_add_file(struct broker *broker, struct file *file)
{
	file_ids_RB_INSERT(&broker->files, file);
	file_inodes_RB_INSERT(&broker->files_by_inode, file);
	broker->n_files++;
	observe_file(file, OBSERVED_ADDED);
}

void broker_remove_file(struct broker *broker, struct file *file)
{
	observe_file(file, OBSERVED_REMOVED);
	file_ids_RB_REMOVE(&broker->files, file);
	file_inodes_RB_REMOVE(&broker->files_by_inode, file);
	broker->n_files--;
}

void broker_add_lease_fd(struct broker *broker, struct file *file)
{
	file_fds_RB_INSERT(&broker->files_by_fd, file);
}

void broker_remove_lease_fd(struct broker *broker, struct file *file)
{
	file_fds_RB_REMOVE(&broker->files_by_fd, file);
}

void broker_add_pin(struct broker *broker, struct pin *pin)
{
	pin_ids_RB_INSERT(&broker->pins, pin);
	observe_pin(pin, OBSERVED_ADDED);
}

void broker_remove_pin(struct broker *broker, struct pin *pin)
{
	observe_pin(pin, OBSERVED_REMOVED);
	pin_ids_RB_REMOVE(&broker->pins, pin);
}

void broker_add_revocation(struct broker *broker, struct revocation *revocation)
{
	revocation_ids_RB_INSERT(&broker->revocations, revocation);
	broker->n_running++;
	observe_revocation(revocation, OBSERVED_ADDED);
}

void broker_remove_revocation(struct broker *broker, struct revocation *revocation)
{
	observe_revocation(revocation, OBSERVED_REMOVED);
	revocation_ids_RB_REMOVE(&broker->revocations, revocation);
	if (!revocation->retired) {
		broker->n_running--;
	} else {
		TAILQ_REMOVE(&broker->ended, revocation, of_ended);
		broker->n_ended--;
	}
}

void broker_retire_revocation(struct broker *broker, struct revocation *revocation)
{
	broker->n_running--;
	revocation->retired = true;
	TAILQ_INSERT_TAIL(&broker->ended, revocation, of_ended);
	if (++broker->n_ended > BROKER_ENDED_MAX)
		revocation_free(TAILQ_FIRST(&broker->ended));
}
