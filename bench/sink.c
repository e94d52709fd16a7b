/* The analyzers of the race, and its limit: answers every request as cheaply as it can and counts packets.
 *
 *   sink [-r RATE] [-d INDEX:MS] [-s STEP] PORT...
 *                            analyzers: answers 200 and counts packets for each port; at most RATE packets a second;
 *                            the one with this index (from 0) answers packets after MS milliseconds (-1: never);
 *                            -s: every answer has a Date and an id, which grow by STEP (0: they stay the same)
 *   sink -l PROCESSES PORT   the limit: as many processes on one port that answer 202 as a distributor does, no more
 *
 * One thread a process, epoll. GET /count answers "<packets> <requests>" of the port, GET /total the same of all ports,
 * GET /each the packets of each port, in the order they were given. GET /close/INDEX has that analyzer refuse
 * connections and resets those it has, as if it were killed; GET /open/INDEX has it listen again; ask another one.
 * GET anything else (a health check) answers as well.
 * A request without X-Packet-Count carries one packet. Only what clients of this benchmark send is understood; a body
 * without a Content-Length ends the program, so that it is not counted wrong.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_ROOM = 65536, READ = 262144, REPLIES = 262144, REPLY = 512 };
static const char OK[] = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
static const char ACCEPTED[] =
    "HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\nContent-Length: 84\r\n\r\n"
    "{\"status\":\"accepted\",\"packetId\":\"01a209d3-2da8-7d29-8a7b-0aa3a6533672\",\"messages\":2}";

struct listener { int fd; long packets, requests; const char *port; struct connection *connections; };
struct connection {
    int fd;
    int pending;            /* answers that are still to be given, or a connection that is gone would be */
    int gone;
    struct listener *on;
    struct connection *next, **before;   /* of those on the same listener */
    size_t body_left;
    size_t kept;            /* bytes of a head that is not whole */
    char *head;
};

static struct listener *listeners;
static int ports, poll_fd;
static struct connection *dropped;         /* to be freed once no event of this turn can be about them */
static const char *yes = OK;
static size_t yes_length = sizeof OK - 1;
static long step = -1;
static double seconds_a_packet, free_at;   /* when the packets read so far would be worked off */
static int slow = -1;                      /* the index of the analyzer that answers late */
static double delay;                       /* seconds; below 0: for ever */
static struct answer { double due; struct connection *to; } *late;   /* a circle, the oldest first */
static size_t late_first, late_count, late_room;
static char input[HEAD_ROOM + READ], output[REPLIES];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static long field(const char *head, size_t n, const char *name, long missing) {
    size_t length = strlen(name);
    for (const char *p = head; (p = memchr(p, '\n', (size_t)(head + n - p))) != NULL;) {
        p++;
        if ((size_t)(head + n - p) > length && strncasecmp(p, name, length) == 0 && p[length] == ':')
            return strtol(p + length + 1, NULL, 10);
    }
    return missing;
}

static void listen_on(struct listener *on) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(on->port))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int one = 1;
    on->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(on->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(on->fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one);
    if (bind(on->fd, (struct sockaddr *)&address, sizeof address) || listen(on->fd, 4096)) {
        perror(on->port);
        exit(1);
    }
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uint64_t)(on - listeners)};
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, on->fd, &event);
}

static void take(struct listener *on) {
    int fd, one = 1;
    while ((fd = accept4(on->fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct connection *c = calloc(1, sizeof *c);
        c->fd = fd;
        c->on = on;
        c->next = on->connections;
        c->before = &on->connections;
        if (c->next) c->next->before = &c->next;
        on->connections = c;
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &event);
    }
}

static void drop(struct connection *c) {
    close(c->fd);
    free(c->head);
    c->head = NULL;
    c->gone = 1;
    *c->before = c->next;
    if (c->next) c->next->before = c->before;
    if (c->pending) return;
    c->next = dropped;
    dropped = c;
}

static void free_dropped(void) {
    while (dropped) {
        struct connection *c = dropped;
        dropped = c->next;
        free(c);
    }
}

static void close_analyzer(int index) {
    struct linger reset = {.l_onoff = 1, .l_linger = 0};
    if (index < 0 || index >= ports || listeners[index].fd < 0) return;
    struct listener *on = &listeners[index];
    close(on->fd);
    on->fd = -1;
    while (on->connections) {
        setsockopt(on->connections->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
        drop(on->connections);
    }
}

static void open_analyzer(int index) {
    if (index >= 0 && index < ports && listeners[index].fd < 0) listen_on(&listeners[index]);
}

static size_t figures(struct connection *c, const char *path, char *out) {
    static char text[REPLIES / 2];
    size_t length = 0;
    struct listener all = {0};
    for (int i = 0; i < ports; i++) {
        all.packets += listeners[i].packets;
        all.requests += listeners[i].requests;
    }
    if (strncmp(path, "/close/", 7) == 0) close_analyzer(atoi(path + 7));
    else if (strncmp(path, "/open/", 6) == 0) open_analyzer(atoi(path + 6));
    struct listener *one = memcmp(path, "/total ", 7) == 0 ? &all : c->on;
    if (memcmp(path, "/each ", 6) == 0)
        for (int i = 0; i < ports && length < sizeof text - 32; i++)
            length += (size_t)sprintf(text + length, "%ld\n", listeners[i].packets);
    else
        length = (size_t)sprintf(text, "%ld %ld\n", one->packets, one->requests);
    return (size_t)sprintf(out, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\n\r\n%s", length, text);
}

static void answer_late(struct connection *c) {
    if (delay < 0) return;
    if (late_count == late_room) {
        size_t room = late_room ? 2 * late_room : 1024;
        struct answer *grown = malloc(room * sizeof *grown);
        for (size_t i = 0; i < late_count; i++) grown[i] = late[(late_first + i) % late_room];
        free(late);
        late = grown;
        late_first = 0;
        late_room = room;
    }
    late[(late_first + late_count++) % late_room] = (struct answer){now() + delay, c};
    c->pending++;
}

/* Gives the late answers that are due; returns for how many milliseconds no other is due, -1 for ever. */
static int give_late_answers(void) {
    while (late_count) {
        struct answer first = late[late_first];
        double wait = first.due - now();
        if (wait > 0) return (int)(wait * 1e3) + 1;
        late_first = (late_first + 1) % late_room;
        late_count--;
        first.to->pending--;
        if (!first.to->gone) {
            if (write(first.to->fd, yes, yes_length) < 0) shutdown(first.to->fd, SHUT_RDWR);
        } else if (first.to->pending == 0)
            free(first.to);
    }
    return -1;
}

static size_t answer(struct connection *c, const char *head, size_t n, char *out) {
    if (memcmp(head, "GET ", 4) == 0) return figures(c, head + 4, out);
    long length = field(head, n, "Content-Length", -1);
    if (length < 0) {
        fprintf(stderr, "sink: a request without Content-Length:\n%.*s", (int)n, head);
        exit(1);
    }
    long packets = field(head, n, "X-Packet-Count", 1);
    c->on->packets += packets;
    c->on->requests++;
    c->body_left = (size_t)length;
    free_at += (double)packets * seconds_a_packet;
    if (c->on == listeners + slow) {
        answer_late(c);
        return 0;
    }
    if (step >= 0) {
        long number = c->on->requests * step;
        return (size_t)sprintf(out, "HTTP/1.1 200 OK\r\nDate: Sat, 28 Nov 2026 10:%02ld:%02ld GMT\r\nX-Request-Id: %ld\r\n"
                               "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
                               number / 60 % 60, number % 60, 1000000 + number);
    }
    memcpy(out, yes, yes_length);
    return yes_length;
}

/* Waits like an analyzer that needs its time for each packet; what comes meanwhile waits in the sockets. */
static void work_off(void) {
    double t = now();
    if (free_at < t) free_at = t;
    else if (free_at > t + 0.0005) usleep((useconds_t)((free_at - t) * 1e6));
}

static int serve(struct connection *c) {
    if (c->kept) memcpy(input, c->head, c->kept);
    ssize_t got = read(c->fd, input + c->kept, READ);
    if (got <= 0) return got < 0 && errno == EAGAIN ? 0 : -1;
    char *p = input, *end = input + c->kept + got;
    size_t out = 0;
    c->kept = 0;
    while (p < end) {
        size_t body = c->body_left < (size_t)(end - p) ? c->body_left : (size_t)(end - p);
        p += body;
        c->body_left -= body;
        if (p == end) break;
        char *stop = memmem(p, (size_t)(end - p), "\r\n\r\n", 4);
        if (stop == NULL) {
            c->kept = (size_t)(end - p);
            if (c->kept > HEAD_ROOM) return -1;
            if (c->head == NULL && (c->head = malloc(HEAD_ROOM)) == NULL) return -1;
            memcpy(c->head, p, c->kept);
            break;
        }
        if (out > REPLIES / 2 - REPLY) {
            if (write(c->fd, output, out) != (ssize_t)out) return -1;
            out = 0;
        }
        out += answer(c, p, (size_t)(stop + 4 - p), output + out);
        p = stop + 4;
    }
    if (seconds_a_packet > 0) work_off();
    return out && write(c->fd, output, out) != (ssize_t)out ? -1 : 0;
}

int main(int argc, char **argv) {
    int option, processes = 1;
    while ((option = getopt(argc, argv, "r:d:l:s:")) != -1) {
        if (option == 'r') seconds_a_packet = 1 / atof(optarg);
        else if (option == 'd') {
            char *rest;
            slow = (int)strtol(optarg, &rest, 10);
            delay = *rest == ':' ? atof(rest + 1) / 1e3 : -1;
        } else if (option == 's') step = atol(optarg);
        else if (option == 'l') processes = atoi(optarg), yes = ACCEPTED, yes_length = sizeof ACCEPTED - 1;
        else return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    while (--processes > 0)
        if (fork() == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            break;
        }
    ports = argc - optind;
    listeners = calloc((size_t)ports, sizeof *listeners);
    poll_fd = epoll_create1(0);
    for (int i = 0; i < ports; i++) {
        listeners[i].port = argv[optind + i];
        listen_on(&listeners[i]);
    }
    puts("ready");
    fflush(stdout);
    for (;;) {
        struct epoll_event events[512];
        int n = epoll_wait(poll_fd, events, 512, give_late_answers());
        for (int k = 0; k < n; k++) {
            if (events[k].data.u64 < (uint64_t)ports) {
                take(&listeners[events[k].data.u64]);
                continue;
            }
            struct connection *c = events[k].data.ptr;
            if (!c->gone && serve(c) < 0) drop(c);
        }
        free_dropped();
    }
}
