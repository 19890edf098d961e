// Command bare does the least that the program must do, for the benchmark that
// measures how far the program is from it.
//
//	bare web     answers POST /event, /denied and /nothing
//	bare worker  drains a watch of all Deployments and sends the PATCHes of POST /patch
//	bare list    lists and decodes all Deployments once
package main

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/valkey-io/valkey-go"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
)

const (
	concurrency = 16  // WORKER_CONCURRENCY
	listPage    = 250 // as the worker's
)

var deployments = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}

func main() {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	switch os.Args[1] {
	case "web":
		mux.Handle("POST /event", newEvent())
		mux.HandleFunc("POST /denied", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnauthorized) })
		mux.HandleFunc("POST /nothing", func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.WriteHeader(http.StatusAccepted)
		})
	case "worker":
		mux.Handle("POST /patch", newPatcher())
	case "list":
		list(newClient())
		return
	}
	server := &http.Server{ // with the program's settings
		Addr:                         os.Getenv("ADDR"),
		Handler:                      mux,
		ReadHeaderTimeout:            time.Second,
		ReadTimeout:                  5 * time.Second,
		WriteTimeout:                 time.Minute, // for /patch
		MaxHeaderBytes:               6 << 10,
		DisableGeneralOptionsHandler: true,
	}
	server.SetKeepAlivesEnabled(false)
	log.Fatal(server.ListenAndServe())
}

// event reads the body, verifies one signature and runs the program's script.
type event struct {
	key    *rsa.PublicKey
	script *valkey.Lua
	client valkey.Client
	keys   []string
	args   []string
}

func newEvent() *event {
	der, err := base64.StdEncoding.DecodeString(os.Getenv("KEY"))
	check(err)
	key, err := x509.ParsePKCS1PublicKey(der)
	check(err)
	client, err := valkey.NewClient(valkey.ClientOption{ // as the program's
		InitAddress:         []string{os.Getenv("VALKEY_ADDR")},
		ReadBufferEachConn:  64 << 10,
		WriteBufferEachConn: 64 << 10,
		RingScaleEachConn:   10,
		PipelineMultiplex:   -1,
		AlwaysPipelining:    true,
		ForceSingleClient:   true,
		DisableRetry:        true,
		DisableCache:        true,
		ClientSetInfo:       valkey.DisableClientSetInfo,
	})
	check(err)
	return &event{key, valkey.NewLuaScript(os.Getenv("SCRIPT")), client,
		[]string{os.Getenv("LEDGER")}, []string{os.Getenv("CHANNEL"), "1", os.Getenv("IMAGE")}}
}

func (e *event) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	dot := max(0, strings.LastIndexByte(token, '.'))
	signature, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(token[dot:], "."))
	if err == nil {
		sum := sha256.Sum256([]byte(token[:dot]))
		err = rsa.VerifyPKCS1v15(e.key, crypto.SHA256, sum[:], signature)
	}
	if err == nil {
		_, err = io.ReadAll(r.Body)
	}
	if err == nil {
		err = e.script.Exec(r.Context(), e.client, e.keys, e.args).Error()
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusAccepted)
}

func newConfig() *rest.Config {
	return &rest.Config{Host: os.Getenv("API"), BearerToken: os.Getenv("TOKEN"), TLSClientConfig: rest.TLSClientConfig{CAFile: os.Getenv("CA")}, QPS: -1}
}

func newClient() dynamic.Interface {
	client, err := dynamic.NewForConfig(newConfig())
	check(err)
	return client
}

// newPatcher opens the watch, and returns what sends the patches of a request.
func newPatcher() http.Handler {
	stream, err := rest.HTTPClientFor(newConfig())
	check(err)
	open := func(since string) io.Reader {
		request, err := http.NewRequest(http.MethodGet, os.Getenv("API")+"/apis/apps/v1/deployments?watch=1&resourceVersion="+since, nil)
		check(err)
		response, err := stream.Do(request)
		check(err)
		return response.Body
	}
	client := newClient()
	newest := func() string {
		list, err := client.Resource(deployments).List(context.Background(), metav1.ListOptions{Limit: 1})
		check(err)
		return list.GetResourceVersion()
	}
	watch := open(os.Getenv("SINCE"))
	go func() {
		for { // the API server ends a watch that is slower than the changes
			_, err := io.Copy(io.Discard, watch)
			log.Print("the watch ended: ", err)
			watch = open(newest())
		}
	}()
	newest() // connects
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var patches []struct{ Namespace, Name, Body string }
		check(json.NewDecoder(r.Body).Decode(&patches))
		var sent sync.WaitGroup
		slots := make(chan struct{}, concurrency)
		for _, p := range patches {
			slots <- struct{}{}
			sent.Go(func() {
				defer func() { <-slots }()
				_, err := client.Resource(deployments).Namespace(p.Namespace).
					Patch(context.Background(), p.Name, types.MergePatchType, []byte(p.Body), metav1.PatchOptions{FieldManager: "bare"})
				check(err)
			})
		}
		sent.Wait()
	})
}

func list(client dynamic.Interface) {
	count, options := 0, metav1.ListOptions{Limit: listPage}
	for {
		page, err := client.Resource(deployments).List(context.Background(), options)
		check(err)
		count += len(page.Items)
		if options.Continue = page.GetContinue(); options.Continue == "" {
			fmt.Println(count)
			return
		}
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
