package workloadapi_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// child plays a workload. Its commands:
//
//	fetch SOCKET      follow the X509-SVIDs; then obey lines of input
//	fetchfd FD        the same over an inherited connection
//	connect SOCKET    connect, say so and obey
//	pass SOCKET       connect, hand the connection to a new process that runs fetchfd, and obey
//	sniff FD MARK     read raw bytes from FD and say whether MARK was among them when it ends
//	flood SOCKET N    open up to N connections and hold them
//	idle              say hello and wait
//
// and the lines of input: "exec EXE args...", where the argument FD stands for the descriptor of the connection, which
// stays open, "setuid REAL EFFECTIVE SAVED", "exit".
func child(args []string, in io.Reader, out io.Writer) int {
	var conn net.Conn
	var err error
	switch args[0] {
	case "fetch", "pass", "connect":
		conn, err = net.Dial("unix", args[1])
	case "fetchfd", "sniff":
		var fd int
		if fd, err = strconv.Atoi(args[1]); err == nil {
			conn, err = net.FileConn(os.NewFile(uintptr(fd), "inherited"))
		}
	}
	if err != nil {
		fmt.Fprintln(out, "error", err)
		return 1
	}
	switch args[0] {
	case "fetch":
		go fetch(conn, out)
	case "fetchfd":
		fetched := make(chan struct{})
		go func() {
			defer close(fetched)
			fetch(conn, out)
		}()
		// Its parent's end is the end of the input: what becomes of the stream then is what the tests ask.
		defer func() {
			select {
			case <-fetched:
			case <-time.After(10 * time.Second):
			}
		}()
	case "pass":
		f, _ := conn.(*net.UnixConn).File()
		heir := exec.Command("/proc/self/exe", "fetchfd", "3")
		heir.ExtraFiles = []*os.File{f}
		heir.Stdout, heir.Stderr, heir.Env = os.Stdout, os.Stderr, os.Environ()
		keep, err := heir.StdinPipe()
		if err == nil {
			err = heir.Start()
		}
		if err != nil {
			fmt.Fprintln(out, "error", err)
			return 1
		}
		defer keep.Close()
	case "connect":
		fmt.Fprintln(out, "connected")
	case "sniff":
		go sniff(conn, args[2], out)
	case "flood":
		n, _ := strconv.Atoi(args[2])
		var held []net.Conn
		for len(held) < n {
			c, err := net.DialTimeout("unix", args[1], 2*time.Second)
			if err != nil {
				break
			}
			held = append(held, c)
			defer c.Close()
		}
		fmt.Fprintln(out, "flooded", len(held))
	case "idle":
		fmt.Fprintln(out, "hello", os.Getpid())
	}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		if err := obey(strings.Fields(lines.Text()), conn, out); err != nil {
			fmt.Fprintln(out, "error", err)
			return 1
		}
	}
	return 0
}

func fetch(conn net.Conn, out io.Writer) {
	used := false
	cc, err := grpc.NewClient("passthrough:agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if used {
				return nil, fmt.Errorf("the connection is closed")
			}
			used = true
			return conn, nil
		}))
	if err != nil {
		fmt.Fprintln(out, "error", err)
		return
	}
	ctx := metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true")
	stream, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	for err == nil {
		var resp *workload.X509SVIDResponse
		if resp, err = stream.Recv(); err == nil {
			line := "svid"
			for _, s := range resp.Svids {
				line += " " + s.SpiffeId
			}
			fmt.Fprintln(out, line)
		}
	}
	fmt.Fprintln(out, "end", status.Code(err), status.Convert(err).Message())
}

func sniff(conn net.Conn, mark string, out io.Writer) {
	fmt.Fprintln(out, "sniffing")
	all, _ := io.ReadAll(io.LimitReader(conn, 1<<20))
	fmt.Fprintln(out, "sniffed", bytes.Contains(all, []byte(mark)))
}

func obey(words []string, conn net.Conn, out io.Writer) error {
	switch words[0] {
	case "exec":
		f, err := conn.(*net.UnixConn).File()
		if err != nil {
			return err
		}
		// Whatever its number is: a fixed one may be taken, also by the duplicate itself.
		fd := f.Fd()
		if _, err := unix.FcntlInt(fd, unix.F_SETFD, 0); err != nil { // not to be closed by exec
			return err
		}
		for i, word := range words {
			if word == "FD" {
				words[i] = strconv.Itoa(int(fd))
			}
		}
		err = syscall.Exec(words[1], words[1:], os.Environ())
		runtime.KeepAlive(f)
		return err
	case "setuid":
		var ids [3]int
		for i := range ids {
			var err error
			if ids[i], err = strconv.Atoi(words[1+i]); err != nil {
				return err
			}
		}
		if err := syscall.Setresuid(ids[0], ids[1], ids[2]); err != nil {
			return err
		}
		fmt.Fprintln(out, "now uid", ids[1])
		return nil
	case "exit":
		os.Exit(0)
	}
	return fmt.Errorf("unknown command %q", words)
}
