package pgstore_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/stagedrollout/rollout/adapters/pgstore"
)

func Example() {
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	store, err := pgstore.New(pool, nil)
	if err != nil {
		log.Fatal(err)
	}
	if err := store.Create(ctx); err != nil { // unless your migrations do it
		log.Fatal(err)
	}

	// One store does for all rollouts of the process:
	//
	//	r, err := rollout.New("checkout", policy, &rollout.Options{Store: store})
}

// The pool goes through PgBouncer, which pools transactions: a connection of
// its own, past PgBouncer, listens for changes. Without one, set Poll.
func ExampleOptions_pgBouncer() {
	pool, err := pgxpool.New(context.Background(), "postgres://app@pgbouncer:6432/app")
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	direct, err := pgx.ParseConfig("postgres://app@primary:5432/app")
	if err != nil {
		log.Fatal(err)
	}
	listening, err := pgstore.New(pool, &pgstore.Options{Listen: direct})
	if err != nil {
		log.Fatal(err)
	}

	polling, err := pgstore.New(pool, &pgstore.Options{Poll: time.Second})
	if err != nil {
		log.Fatal(err)
	}
	_, _ = listening, polling
}

func ExampleStore_DDL() {
	config, err := pgxpool.ParseConfig("postgres://app@primary/app")
	if err != nil {
		log.Fatal(err)
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), config) // connects when it is used
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	store, err := pgstore.New(pool, &pgstore.Options{Schema: "ops", Table: "rollouts"})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(store.DDL())
	// Output:
	// create table if not exists "ops"."rollouts" (
	// 	key      bytea  primary key,
	// 	value    bytea  not null,
	// 	revision bigint not null check (revision > 0)
	// )
}
