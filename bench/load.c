/* Load that wrk cannot make. Prints one line of JSON.
 *
 *   load count PORT BODY CONNECTIONS PACKETS        as many packets as fast as they are answered, then ends
 *   load rate PORT BODY CONNECTIONS RATE SECONDS    open loop: RATE packets a second, whatever the answers do
 *   load hold PORT BODY CONNECTIONS                 one packet on each connection, which then stays open and idle until
 *                                                   standard input ends; a first line says that all were answered
 *
 * Open loop: packet k is due at start + k / RATE. It is sent then, or as soon as one of the connections is free, and
 * its latency counts from when it was due, so a server that stalls is charged for everything that had to wait meanwhile
 * (no coordinated omission). What is not answered 10 s after the last packet was due counts as taking until then.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_ROOM = 4096, GRACE = 10 };
#define SECOND 1000000000LL

struct connection {
    int fd, status;
    int64_t due, packet;     /* of the request under way; packet -1: none */
    long body_left;
    size_t kept;
    char head[HEAD_ROOM];
};

static struct connection *connections;
static int *idle, idle_first, idle_count, count, poll_fd, timer_fd = -1;
static char *request;
static size_t request_length;
static int64_t *latency, *late;    /* of each packet, ns: until its answer, until it was sent; -1: not yet */
static int64_t start, interval, sent, answered, refused, wanted;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

static void fail(const char *what) {
    fprintf(stderr, "load: %s\n", what);
    exit(1);
}

static void fail_with_errno(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void prepare(const char *port, const char *path) {
    static char body[1 << 20];
    FILE *file = fopen(path, "rb");
    if (file == NULL) fail_with_errno(path);
    size_t length = fread(body, 1, sizeof body, file);
    fclose(file);
    request = malloc(length + 256);
    request_length = (size_t)sprintf(request, "POST /logs HTTP/1.1\r\nHost: 127.0.0.1:%s\r\n"
                                     "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n", port, length);
    memcpy(request + request_length, body, length);
    request_length += length;
}

static void connect_all(const char *port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int one = 1, room = 1 << 18;
    struct linger reset = {.l_onoff = 1, .l_linger = 0};   /* thousands of TIME_WAITs would disturb the next run */
    poll_fd = epoll_create1(0);
    connections = calloc((size_t)count, sizeof *connections);
    idle = calloc((size_t)count, sizeof *idle);
    for (int i = 0; i < count; i++) {
        struct connection *c = &connections[i];
        c->fd = socket(AF_INET, SOCK_STREAM, 0);
        if (c->fd < 0) fail_with_errno("socket");
        c->packet = -1;
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
        if (request_length > 4096) setsockopt(c->fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
        if (connect(c->fd, (struct sockaddr *)&address, sizeof address)) fail_with_errno("connect");
        struct epoll_event event = {.events = EPOLLIN, .data.u32 = (uint32_t)i};
        epoll_ctl(poll_fd, EPOLL_CTL_ADD, c->fd, &event);
        idle[idle_count++] = i;
    }
}

/* Sends the next packet on the connection that has been idle for longest. */
static void send_next(int64_t due, int64_t t) {
    struct connection *c = &connections[idle[idle_first]];
    idle_first = (idle_first + 1) % count;
    idle_count--;
    c->due = due;
    c->packet = sent++;
    c->kept = 0;
    c->body_left = -1;
    if (late) late[c->packet] = t - due;
    ssize_t done = send(c->fd, request, request_length, MSG_NOSIGNAL);
    if (done != (ssize_t)request_length) fail("the server takes no more");
}

static void send_due(void) {
    int64_t t = now();
    while (idle_count && sent < wanted && (interval == 0 || start + sent * interval <= t))
        send_next(interval ? start + sent * interval : t, t);
}

static long content_length(const char *head) {
    const char *found = strcasestr(head, "\r\ncontent-length:");
    if (found == NULL) fail("an answer without Content-Length");
    return strtol(found + 17, NULL, 10);
}

static void receive(struct connection *c) {
    ssize_t got = recv(c->fd, c->head + c->kept, HEAD_ROOM - 1 - c->kept, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) fail("the server closed a connection");
    if (c->packet < 0) fail("an answer to no request");
    c->kept += (size_t)got;
    if (c->body_left < 0) {
        c->head[c->kept] = 0;
        char *stop = strstr(c->head, "\r\n\r\n");
        if (stop == NULL) {
            if (c->kept == HEAD_ROOM - 1) fail("the head of an answer is too large");
            return;
        }
        c->status = atoi(c->head + 9);
        c->body_left = content_length(c->head);
        c->kept -= (size_t)(stop + 4 - c->head);
    }
    c->body_left -= (long)c->kept;
    c->kept = 0;
    if (c->body_left > 0) return;
    if (latency) latency[c->packet] = now() - c->due;
    answered++;
    if (c->status / 100 != 2) refused++;
    c->packet = -1;
    idle[(idle_first + idle_count++) % count] = (int)(c - connections);
}

static void turn(int milliseconds) {
    struct epoll_event events[256];
    int n = epoll_wait(poll_fd, events, 256, milliseconds);
    for (int k = 0; k < n; k++) {
        uint64_t expired;
        if (events[k].data.u32 != UINT32_MAX) receive(&connections[events[k].data.u32]);
        else if (read(timer_fd, &expired, sizeof expired) < 0 && errno != EAGAIN) fail_with_errno("timer");
    }
}

static int ascending(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static double milliseconds(int64_t *sorted, double share) {
    return (double)sorted[(int64_t)((double)(wanted - 1) * share)] / 1e6;
}

static void run_rate(double rate, double seconds) {
    wanted = (int64_t)(rate * seconds);
    interval = (int64_t)(SECOND / rate);
    latency = malloc((size_t)wanted * sizeof *latency);
    late = malloc((size_t)wanted * sizeof *late);
    for (int64_t i = 0; i < wanted; i++) latency[i] = late[i] = -1;
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    int64_t tick = interval < 50000 ? 50000 : interval;
    struct itimerspec every = {{0, tick}, {0, tick}};
    timerfd_settime(timer_fd, 0, &every, NULL);
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = UINT32_MAX};
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, timer_fd, &event);
    start = now();
    int64_t end = start + wanted * interval + GRACE * SECOND;
    while (answered < wanted && now() < end) {
        send_due();
        turn(100);
    }
    int64_t t = now();
    for (int64_t i = 0; i < wanted; i++) {
        if (latency[i] < 0) latency[i] = t - (start + i * interval);
        if (late[i] < 0) late[i] = t - (start + i * interval);
    }
    qsort(latency, (size_t)wanted, sizeof *latency, ascending);
    qsort(late, (size_t)wanted, sizeof *late, ascending);
    printf("{\"sent\": %ld, \"answered\": %ld, \"refused\": %ld, \"p50\": %.3f, \"p90\": %.3f, \"p99\": %.3f, "
           "\"p999\": %.3f, \"max\": %.3f, \"late_p50\": %.3f, \"late_p99\": %.3f}\n",
           sent, answered, refused, milliseconds(latency, 0.5), milliseconds(latency, 0.9),
           milliseconds(latency, 0.99), milliseconds(latency, 0.999), milliseconds(latency, 1),
           milliseconds(late, 0.5), milliseconds(late, 0.99));
}

static void run_count(int64_t packets) {
    wanted = packets;
    start = now();
    while (answered < wanted) {
        send_due();
        turn(-1);
    }
    printf("{\"sent\": %ld, \"answered\": %ld, \"refused\": %ld, \"seconds\": %.3f}\n", sent, answered, refused,
           (double)(now() - start) / SECOND);
}

static void run_hold(void) {
    run_count(count);
    fflush(stdout);
    char nothing[64];
    while (read(0, nothing, sizeof nothing) > 0) {}
    int closed = 0;
    for (int i = 0; i < count; i++) {
        char byte;
        closed += recv(connections[i].fd, &byte, 1, MSG_DONTWAIT) >= 0 || errno != EAGAIN;
    }
    printf("{\"held\": %d, \"closed\": %d}\n", count, closed);
}

int main(int argc, char **argv) {
    if (argc < 5) fail("arguments: count|rate|hold PORT BODY CONNECTIONS [PACKETS | RATE SECONDS]");
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    setpriority(PRIO_PROCESS, 0, -10);   /* where it may: what makes the load wait is counted as the server's doing */
    count = atoi(argv[4]);
    prepare(argv[2], argv[3]);
    connect_all(argv[2]);
    if (strcmp(argv[1], "count") == 0 && argc == 6) run_count(atoll(argv[5]));
    else if (strcmp(argv[1], "rate") == 0 && argc == 7) run_rate(atof(argv[5]), atof(argv[6]));
    else if (strcmp(argv[1], "hold") == 0 && argc == 5) run_hold();
    else fail("what is to be done?");
    return 0;
}
