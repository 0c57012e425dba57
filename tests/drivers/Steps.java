// The steps of tests/system/driver_steps.rs through pgjdbc.
// usage: java -cp postgresql.jar Steps.java jdbc:URL (of a node outside us-west-1) COLLECTION
import java.sql.*;
import org.postgresql.util.PSQLException;
import org.postgresql.util.ServerErrorMessage;

class Steps {
    static final String BACKUP = "BACKUP DATABASE movr INTO ? WITH EXECUTION LOCALITY = ?";
    static Connection conn;

    static PreparedStatement bound(String sql, Object... values) throws SQLException {
        PreparedStatement statement = conn.prepareStatement(sql);
        for (int i = 0; i < values.length; i++) {
            statement.setObject(i + 1, values[i]);
        }
        return statement;
    }

    static ResultSet first(String sql, Object... values) throws SQLException {
        ResultSet rows = bound(sql, values).executeQuery();
        if (!rows.next()) throw new SQLException("no row: " + sql);
        return rows;
    }

    static void say(Object... words) {
        StringBuilder line = new StringBuilder();
        for (Object word : words) line.append(line.length() > 0 ? " " : "").append(word);
        System.out.println(line);
    }

    public static void main(String[] args) throws Exception {
        String into = args[1];
        conn = DriverManager.getConnection(args[0]);
        ResultSet row = first(BACKUP, into, "");
        ResultSetMetaData columns = row.getMetaData();
        Object[] names = new Object[columns.getColumnCount()];
        for (int i = 0; i < names.length; i++) names[i] = columns.getColumnName(i + 1);
        say(names);
        say(row.getString("status"), row.getDouble(3) == 1, row.getLong("rows") > 0, row.getLong("bytes") > 0);
        try {
            first(BACKUP, into, "region=us-west-1");
        } catch (PSQLException error) {
            ServerErrorMessage said = error.getServerErrorMessage();
            String job = said.getMessage().split(" ")[3];
            String fields = String.join("|", said.getSQLState(), said.getSeverity(), said.getMessage(), said.getDetail(),
                said.getHint());
            say(fields.replace(job, "ID"));
        }
        row = first(BACKUP + ", DETACHED", into, "region=us-west-1");
        long made = row.getLong("job_id");
        say(row.getMetaData().getColumnName(1), Long.toString(made).length(), first("SELECT 1").getInt(1));
        // From the fifth time on, pgjdbc prepares on the server and asks for binary results.
        for (int i = 0; i < 7; i++) row = first("SHOW JOB WHEN COMPLETE ?", made);
        boolean typed = row.getObject(1) instanceof Long && row.getObject("created") instanceof Timestamp
            && row.getObject("fraction_completed") instanceof Double;
        String[] errors = (String[]) row.getArray("execution_errors").getArray();
        say(row.getLong(1) == made, row.getString(2), row.getString("status"), row.getDouble(12) == 1,
            errors.length == 0, typed);
        conn.createStatement().execute("SET backhaul.debug_pausepoints = 'backup.after_lock:hold'");
        long held = first(BACKUP + ", DETACHED", into, "").getLong(1);
        conn.createStatement().execute("RESET backhaul.debug_pausepoints");
        PreparedStatement waiting = bound("SHOW JOB WHEN COMPLETE ?", held);
        Thread canceller = new Thread(() -> {
            try {
                while (true) {
                    Thread.sleep(50);
                    waiting.cancel();
                }
            } catch (InterruptedException | SQLException over) {
                // The wait has ended.
            }
        });
        canceller.start();
        try {
            waiting.executeQuery();
        } catch (SQLException error) {
            say("canceled", error.getSQLState());
        }
        canceller.interrupt();
        canceller.join();
        say(bound("CANCEL JOB ?", held).executeUpdate());
        say(first("SHOW JOB WHEN COMPLETE ?", held).getString("status"));
        say(first("SELECT 'usable'").getString(1));
        conn.close();
    }
}
