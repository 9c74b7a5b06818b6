package docker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

var (
	// errUnknown says that an engine has no such container.
	errUnknown = errors.New("it does not know the container")

	// errAbsent says that nobody listens there.
	errAbsent = errors.New("nobody listens there")

	// errSilent says that an engine hangs.
	errSilent = errors.New("no answer in time")
)

// An engine is one that listens on a Unix socket.
type engine struct {
	// path is the socket.
	path string

	// uid is the user who must listen there. A socket's path says nothing: who may write to its folder can put another there.
	uid uint32

	// dir is a folder of that user's, and below is the socket's path in it. If dir is empty, the path is root's.
	dir, below string
}

const (
	maxHeaderBytes = 64 << 10
	maxAnswerBytes = 4 << 20
)

// container asks about a container by its whole id.
func (e engine) container(ctx context.Context, id string) (description, error) {
	client := &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return e.dial(ctx) },
			// One connection for each question and none kept: whoever listens there may change.
			DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: maxHeaderBytes,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	var d description
	err := get(ctx, client, "/containers/"+id+"/json", func(r *http.Response) (err error) {
		d, err = readContainer(r.Body)
		return err
	})
	if err != nil {
		return description{}, err
	}
	if d.id != id {
		// An engine also finds containers by their names, and by the first digits of an id.
		return description{}, fmt.Errorf("it was asked about container %s and answers about %.80q", short(id), d.id)
	}
	if d.image != "" {
		err := get(ctx, client, "/images/"+d.image+"/json", func(r *http.Response) (err error) {
			d.digests, err = readImage(r.Body)
			return err
		})
		if err != nil && !errors.Is(err, errUnknown) { // an image may be deleted while its container runs
			d.missing = errors.Join(d.missing, fmt.Errorf("digests of the image: %w", err))
		}
	}
	return d, nil
}

// ping asks for a sign of life.
func (e engine) ping(ctx context.Context) error {
	client := &http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return e.dial(ctx) },
		DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: maxHeaderBytes,
	}}
	return get(ctx, client, "/_ping", func(*http.Response) error { return nil })
}

func get(ctx context.Context, client *http.Client, path string, read func(*http.Response) error) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://engine"+path, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		if ctx.Err() != nil {
			return errSilent
		}
		return err
	}
	defer response.Body.Close()
	switch response.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return errUnknown
	default:
		return fmt.Errorf("GET %s: status %d", path, response.StatusCode)
	}
	if err := read(response); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("%w: only a part of one", errSilent)
		}
		return fmt.Errorf("GET %s: %w", path, err)
	}
	return nil
}

// dial connects and makes sure of who listens. The kernel noted the listener's user when it began to listen.
func (e engine) dial(ctx context.Context) (net.Conn, error) {
	address := e.path
	if e.dir != "" {
		fd, err := e.open()
		if err != nil {
			return nil, err
		}
		defer unix.Close(fd)
		address = "/proc/self/fd/" + strconv.Itoa(fd)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", address)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, errAbsent
	}
	if err != nil {
		return nil, err
	}
	uid, err := listener(conn)
	if err == nil && uid != e.uid {
		err = fmt.Errorf("uid %d listens there and not uid %d; an engine of a user speaks for that user's processes alone (rootless)", uid, e.uid)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func listener(conn net.Conn) (uid uint32, err error) {
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("connection is a %T", conn)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	ctlErr := raw.Control(func(s uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			uid = cred.Uid
		}
	})
	return uid, errors.Join(ctlErr, err)
}

// open finds a user's socket without being led elsewhere: no symbolic link is followed, and no mount entered, so the agent
// neither connects to another's socket with its own rights nor waits for a filesystem that the user serves.
func (e engine) open() (fd int, err error) {
	dir, err := unix.Open(e.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return -1, errAbsent
	}
	if err != nil {
		return -1, fmt.Errorf("opening %s: %w", e.dir, err)
	}
	defer unix.Close(dir)
	if err := e.owned(dir, unix.S_IFDIR); err != nil {
		return -1, err
	}
	fd, err = unix.Openat2(dir, e.below, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
	if errors.Is(err, unix.ENOENT) {
		return -1, errAbsent
	}
	if err != nil {
		return -1, fmt.Errorf("opening %s below %s: %w", e.below, filepath.Base(e.dir), err)
	}
	if err := e.owned(fd, unix.S_IFSOCK); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// owned says whether an open file is of that kind and the user's.
func (e engine) owned(fd int, kind uint32) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != kind || st.Uid != e.uid {
		return fmt.Errorf("%s is not the folder and socket of uid %d", e.path, e.uid)
	}
	return nil
}
