// Package tpmdevice carries commands to a TPM 2.0, a device of the kernel or the Unix socket of a software TPM, with a bound on
// how long that may take. The agent's uses of a TPM call it; it knows nothing of what the commands are for.
package tpmdevice

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	// responseHeader is tag, size and code; the size counts the header.
	responseHeader   = 10
	maxResponseBytes = 8 << 10
	// maxCommand bounds one command: a hardware TPM may take tens of seconds for a key.
	maxCommand = 90 * time.Second
)

// A Channel carries commands to a TPM and gives up when its context ends: a device that hangs must not hold the agent. After
// Close the next command connects again, since libraries close after each of their steps.
type Channel struct {
	path string
	stop func() bool // ends the watch over the context

	mu      sync.Mutex // guards conn and aborted
	conn    conn
	aborted bool
}

// conn is what devices and sockets have in common.
type conn interface {
	io.ReadWriteCloser
	SetDeadline(time.Time) error
}

// New returns a Channel that is of no more use when ctx ends. Whoever makes it calls Release.
func New(ctx context.Context, path string) *Channel {
	c := &Channel{path: path}
	c.stop = context.AfterFunc(ctx, c.abort)
	return c
}

// abort ends the command under way and refuses further ones.
func (c *Channel) abort() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.aborted = true
	if c.conn != nil {
		_ = c.conn.SetDeadline(time.Unix(1, 0)) // a device that has no deadlines has those of the kernel's driver
	}
}

// ErrGivenUp means that the context of the Channel has ended.
var ErrGivenUp = errors.New("it took too long and was given up")

// Connect opens the device, if it is not open.
func (c *Channel) Connect() error {
	_, err := c.open()
	return err
}

func (c *Channel) open() (conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.aborted {
		return nil, ErrGivenUp
	}
	if c.conn != nil {
		return c.conn, nil
	}
	info, err := os.Stat(c.path)
	switch {
	case err != nil:
		return nil, err
	case info.Mode()&os.ModeSocket != 0:
		s, err := net.DialTimeout("unix", c.path, 5*time.Second)
		if err != nil {
			return nil, err
		}
		c.conn = s.(*net.UnixConn)
	case info.Mode()&os.ModeCharDevice != 0:
		if c.conn, err = openDevice(c.path); err != nil {
			return nil, err
		}
	default:
		return nil, errors.New("it is neither a device nor a Unix socket")
	}
	return c.conn, nil
}

// openDevice opens a device so that its reads wait in the poller and can be ended. Where the driver cannot be polled (Linux
// before 4.20), reads end when the driver gives up.
func openDevice(path string) (conn, error) {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := f.SetDeadline(time.Time{}); err == nil {
		return f, nil
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	if f, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
		return nil, err
	}
	return f, nil
}

// Write sends one command.
func (c *Channel) Write(command []byte) (int, error) {
	conn, err := c.open()
	if err != nil {
		return 0, err
	}
	if err := conn.SetDeadline(time.Now().Add(maxCommand)); err != nil && !errors.Is(err, os.ErrNoDeadline) {
		return 0, err
	}
	if c.isAborted() { // between the two: abort's deadline was overwritten
		return 0, ErrGivenUp
	}
	return conn.Write(command)
}

func (c *Channel) isAborted() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.aborted
}

// Read receives one whole response.
func (c *Channel) Read(into []byte) (int, error) {
	conn, err := c.open()
	if err != nil {
		return 0, err
	}
	n, err := conn.Read(into) // a device gives the whole response in one read
	for err == nil {
		if n >= responseHeader {
			size := binary.BigEndian.Uint32(into[2:])
			switch {
			case size < responseHeader || size > maxResponseBytes || int(size) > len(into):
				return 0, fmt.Errorf("the TPM announces a response of %d bytes", size)
			case n >= int(size):
				return n, nil
			}
		}
		var more int
		more, err = conn.Read(into[n:])
		n += more
	}
	return 0, err
}

// Send carries a command and returns its response, as go-tpm wants it.
func (c *Channel) Send(command []byte) ([]byte, error) {
	if _, err := c.Write(command); err != nil {
		return nil, err
	}
	into := make([]byte, maxResponseBytes)
	n, err := c.Read(into)
	if err != nil {
		return nil, err
	}
	return into[:n], nil
}

// MeasurementLog is empty: what libraries want of it is of no use here.
func (*Channel) MeasurementLog() ([]byte, error) { return nil, nil }

// Close ends the connection; transient objects in the TPM go with it.
func (c *Channel) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return nil
	}
	err := c.conn.Close()
	c.conn = nil
	return err
}

// Release ends the channel for good.
func (c *Channel) Release() error {
	c.stop()
	c.abort()
	return c.Close()
}
