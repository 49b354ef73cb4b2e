/* Loaded into the daemon (LD_PRELOAD): ends it like kill -9 right before the N-th call by which it changes the file
 * system, counted from when the file named by KILL_AT was made, which holds N. Other programs that it starts are spared. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static atomic_long calls;

static void step(void)
{
	int saved = errno;
	const char *path = getenv("KILL_AT");
	FILE *file;
	long at = 0;
	if (!path || strcmp(program_invocation_short_name, "catalyst-daemon") || !(file = fopen(path, "r")))
		goto out;
	if (fscanf(file, "%ld", &at) == 1 && atomic_fetch_add(&calls, 1) + 1 == at)
		kill(getpid(), SIGKILL);
	fclose(file);
out:
	errno = saved;
}

#define WRAP(name, parameters, arguments) \
	int name parameters { \
		static int (*real) parameters; \
		if (!real) \
			real = (int (*) parameters)dlsym(RTLD_NEXT, #name); \
		step(); \
		return real arguments; \
	}

WRAP(rename, (const char *from, const char *to), (from, to))
WRAP(linkat, (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags))
WRAP(unlink, (const char *path), (path))
WRAP(unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
WRAP(fsync, (int fd), (fd))
WRAP(mkdir, (const char *path, mode_t mode), (path, mode))
