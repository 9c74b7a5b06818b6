//go:build scale

// Package node measures an agent in a process of its own, from outside, beside a gRPC server that does nothing but return
// the same bytes. `make scale` runs it.
package node

import (
	"bufio"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

// role makes the test binary be another program than the test: a bare gRPC server, or many workloads.
const role = "SIGNET_NODE_ROLE"

func TestMain(m *testing.M) {
	var err error
	switch os.Getenv(role) {
	case "":
		code := m.Run()
		if dir, err := built(); err == nil {
			os.RemoveAll(dir)
		}
		os.Exit(code)
	case "bare":
		err = bare(os.Args[1])
	case "workloads":
		err = workloads(os.Args[1], os.Args[2])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// A bareServer answers with what it was given, and looks at nobody.
type bareServer struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	x509 *workload.X509SVIDResponse
	jwt  *workload.JWTSVIDResponse
}

func (b *bareServer) FetchX509SVID(_ *workload.X509SVIDRequest, ss grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if err := ss.Send(b.x509); err != nil {
		return err
	}
	<-ss.Context().Done()
	return nil
}

func (b *bareServer) FetchJWTSVID(context.Context, *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	return b.jwt, nil
}

// bare serves on a socket until its input ends. The first two lines of the input are the answers.
func bare(socket string) error {
	in := bufio.NewReader(os.Stdin)
	b := &bareServer{x509: &workload.X509SVIDResponse{}, jwt: &workload.JWTSVIDResponse{}}
	for _, m := range []proto.Message{b.x509, b.jwt} {
		line, err := in.ReadString('\n')
		if err != nil {
			return err
		}
		raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(line))
		if err != nil {
			return err
		}
		if err := proto.Unmarshal(raw, m); err != nil {
			return err
		}
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(s, b)
	go s.Serve(l)
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, in)
	s.Stop()
	return err
}

// workloads holds open as many connections as asked for, each with a stream, says when all have their first message, and
// ends with its input.
func workloads(socket, count string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true"))
	defer cancel()
	gate, errs := make(chan struct{}, 32), make(chan error, n)
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			gate <- struct{}{}
			defer func() { <-gate }()
			conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				errs <- err
				return
			}
			stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			if err != nil {
				errs <- err
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		return fmt.Errorf("%d of %d streams failed: %w", len(errs)+1, n, err)
	default:
	}
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}
